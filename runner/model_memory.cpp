// How much memory a model's state may take, and its allocation.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "backends/messages.h"
#include "runner/model.h"

namespace et_moe {
namespace {

/// Between two powers of two, calls of a method are padded to at most so many lengths, and as many
/// CUDA graphs are captured (`bucket` in backends/cuda/runtime/compiled_method.cpp).
constexpr int64_t kGraphsOfAnOctave = 8;

std::string mib(int64_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

/// Bytes of a page, or of a slot, of all state tensors together.
int64_t bytes_each(const Bindings& bindings, Pool pool) {
  int64_t bytes = 0;
  for (const StateSpec& state : bindings.state) {
    if (state.pool == pool) bytes += static_cast<int64_t>(state.nbytes_each());
  }
  return bytes;
}

int64_t slots_of(const ModelOptions& options) {
  return static_cast<int64_t>(options.max_sequences + options.snapshots);
}

}  // namespace

void Model::call_with(const std::string& method, size_t sequences, size_t tokens) {
  static const std::vector<std::string> token{kToken}, step{kStep};
  const std::vector<int64_t> ids{0};
  const std::vector<int32_t> pages{0};
  const Sampling sampling;
  std::vector<TextRow> rows;
  for (size_t i = 0; i < sequences; ++i) {
    rows.push_back({ids.data(), i == 0 ? size_t{1} : 0, 0, 0, 0, pages, sampling});
  }
  inputs_->set(rows, tokens);
  const bool drafts = method == kDraftDecode || method == kDraftDecodeBatch;
  device_->run({method, inputs_->inputs(), drafts ? step : token, false});
}

void Model::call_singles() {
  if (info_.score_tokens > 0) call_with(kScore, 1, static_cast<size_t>(info_.score_tokens));
  call_with(kDecode, 1, 1);
  if (info_.draft_tokens > 0)
    call_with(kDraftDecode, 1, 1 + static_cast<size_t>(info_.draft_tokens));
}

void Model::call_ranges(size_t max_sequences) {
  // A method's code for other lengths has other kernels, so each power of two below is tried.
  const auto each = [](int64_t most, const auto& call) {
    for (auto n = static_cast<size_t>(most); n > 1; n /= 2) call(n);
  };
  const auto sequences = static_cast<int64_t>(max_sequences);
  const auto drafts = 1 + static_cast<size_t>(info_.draft_tokens);
  each(info_.max_prefill_tokens, [&](size_t n) { call_with(kPrefill, 1, n); });
  each(std::min(sequences, info_.max_sequences), [&](size_t n) { call_with(kDecodeBatch, n, 1); });
  each(std::min(sequences, info_.draft_sequences),
       [&](size_t n) { call_with(kDraftDecodeBatch, n, drafts); });
}

int64_t Model::measure_calls(const ModelOptions& options, const Bindings& bindings) {
  const auto versions = static_cast<int32_t>(1 + info_.draft_tokens);
  const auto used = [this] {
    const llm::GpuMemory memory = *device_->memory();
    return memory.total - memory.free_after_generate;
  };
  const int64_t before = used();
  device_->allocate({1, 1, versions});
  const int64_t state = bytes_each(bindings, Pool::kPages) + bytes_each(bindings, Pool::kSlots);
  call_singles();
  call_ranges(options.max_sequences);
  const int64_t eager = used();
  int64_t graphs = 0;
  if (options.device.cuda_graph) {  // the second call of a length is captured
    call_singles();
    const int64_t singles = used() - eager;
    call_ranges(options.max_sequences);
    graphs = singles + kGraphsOfAnOctave * (used() - eager - singles);
  }
  return std::max<int64_t>(0, eager - before - state) + graphs;
}

size_t Model::pages_within(double fraction, const ModelOptions& options, const Bindings& bindings) {
  const auto memory = device_->memory();
  if (!memory) {
    throw std::runtime_error("memory_fraction: " + program_.path() +
                             " is a program for the CPU, which has no GPU memory");
  }
  const int64_t limit = static_cast<int64_t>(fraction * static_cast<double>(memory->total));
  const int64_t page = bytes_each(bindings, Pool::kPages);
  const int64_t slot = bytes_each(bindings, Pool::kSlots);
  const int64_t loaded = memory->total - memory->free_after_load, slots = slots_of(options);
  const int64_t calls = measure_calls(options, bindings);
  const int64_t rest = limit - loaded - calls - slots * slot;
  const int64_t least = info_.max_pages * page;
  if (rest < least) {
    throw std::runtime_error(
        program_.path() + ": too little GPU memory: with memory_fraction " +
        std::to_string(fraction) + " it may take " + mib(limit) + " of " + mib(memory->total) +
        ", and needs " + mib(limit - rest + least) + ": " + mib(loaded) +
        " for weights, code and what else is on the GPU, " + mib(calls) + " for what calls take, " +
        mib(slots * slot) + " for the state of " + std::to_string(options.max_sequences) +
        " sequences and " + std::to_string(options.snapshots) + " snapshots, and " + mib(least) +
        " of KV cache for one sequence of " + std::to_string(info_.max_seq_len) +
        " tokens: lower max_sequences, which takes " + mib(slot) +
        " each, or raise memory_fraction, or export with a shorter --max-seq-len");
  }
  return page > 0 ? static_cast<size_t>(rest / page) : SIZE_MAX;
}

size_t Model::choose_pages(const ModelOptions& options, const Bindings& bindings) {
  const auto least = static_cast<size_t>(info_.max_pages);
  const size_t pages = options.pages.value_or(options.max_sequences * least);
  if (options.memory_fraction && !options.pages) {
    return std::min(pages, pages_within(*options.memory_fraction, options, bindings));
  }
  if (pages < least) {
    throw std::runtime_error("the KV cache has " + std::to_string(pages) +
                             " pages, expected at least " + std::to_string(least) +
                             " for one sequence of " + std::to_string(info_.max_seq_len) +
                             " tokens");
  }
  return pages;
}

void Model::allocate(const ModelOptions& options, const Bindings& bindings) {
  const auto slots = static_cast<size_t>(slots_of(options));
  const auto versions = static_cast<int32_t>(1 + info_.draft_tokens);
  for (const StateSpec& state : bindings.state) {
    if (state.pool != Pool::kSlots) continue;
    try {
      state.version_bytes(versions);
    } catch (const std::exception& e) {
      throw std::runtime_error(program_.path() + ": " + reason(e));
    }
  }
  const size_t pages = choose_pages(options, bindings);
  for (const StateSpec& state : bindings.state) {
    const size_t wanted = state.pool == Pool::kPages ? pages : slots;
    if (wanted < static_cast<size_t>(state.min_shape[0]) ||
        wanted > static_cast<size_t>(state.shape[0])) {
      throw std::runtime_error(program_.path() + ": the state " + state.name + " is " +
                               state.describe() + ", " + std::to_string(slots) + " slots and " +
                               std::to_string(pages) + " pages do not fit");
    }
  }
  pool_.emplace(static_cast<int32_t>(pages), static_cast<int32_t>(options.max_sequences),
                static_cast<int32_t>(options.snapshots), versions);
  if (options.snapshots > 0) cache_.emplace(*pool_, static_cast<size_t>(info_.page_size));
  try {
    device_->allocate(pool_->sizes);
  } catch (const std::runtime_error& e) {
    const int64_t in_slots = slots_of(options) * bytes_each(bindings, Pool::kSlots);
    const int64_t in_pages = static_cast<int64_t>(pages) * bytes_each(bindings, Pool::kPages);
    throw std::runtime_error(
        program_.path() + ": there is no memory for the state of " +
        std::to_string(options.max_sequences) + " sequences with " + std::to_string(pages) +
        " pages of the KV cache, " + mib(in_slots) + " and " + mib(in_pages) + ": " + e.what() +
        ": lower max_sequences, or set memory_fraction, which bounds the KV cache");
  }
}

}  // namespace et_moe
