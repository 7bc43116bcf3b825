#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "backends/json.h"
#include "backends/messages.h"
#include "runner/model.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;

constexpr int64_t kFormatVersion = 5;
constexpr int64_t kMostDrafts = 3;

/// Throws std::runtime_error unless a method returns for B sequences what it has to: `token`,
/// int64 [B, 1], and `logits`, float32 [B, vocab_size], of `score` [tokens, vocab_size]; fed drafts
/// `step`, int64 [B, 2 + drafts].
void check_outputs(const std::string& method, const MethodSpec& spec, SizeRange sequences,
                   SizeRange tokens, int64_t vocab_size, int64_t drafts) {
  const auto expect = [](const std::string& name, ScalarType dtype, SizeRange rows, int64_t width) {
    const auto columns = static_cast<int32_t>(width);
    return TensorSpec{name, dtype, {rows.most, columns}, {rows.least, columns}};
  };
  const SizeRange rows = method == kScore ? tokens : sequences;
  const std::vector<TensorSpec> usual{expect(kToken, ScalarType::Long, sequences, 1),
                                      expect(kLogits, ScalarType::Float, rows, vocab_size)};
  const std::vector<TensorSpec> of_drafts{expect(kStep, ScalarType::Long, sequences, 2 + drafts)};
  for (const TensorSpec& expected : drafts > 0 ? of_drafts : usual) {
    const size_t i = find_tensor(spec.outputs, expected.name);
    if (i == spec.outputs.size()) {
      throw std::runtime_error("method " + method + " has no output " + expected.name);
    }
    const TensorSpec& found = spec.outputs[i];
    const size_t rank = expected.shape.size();
    if (!found.accepts(expected.dtype, expected.min_shape.data(), rank) ||
        !found.accepts(expected.dtype, expected.shape.data(), rank)) {
      throw std::runtime_error("method " + method + " returns " + expected.name + " as " +
                               found.describe() + ", expected " + expected.describe() +
                               ": get_vocab_size is " + std::to_string(vocab_size));
    }
  }
}

/// What `body` returns; its exceptions get the name of the file that is at fault.
template <typename Body>
auto in_file(const std::string& path, const Body& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    throw std::runtime_error(path + ": " + reason(e));
  }
}

}  // namespace

ModelInfo read_info(const ProgramFile& program) {
  if (const int64_t version = program.count("get_format_version"); version != kFormatVersion) {
    throw std::runtime_error(program.path() + ": format version " + std::to_string(version) +
                             ", this runner reads version " + std::to_string(kFormatVersion) +
                             ": export it again with `et-moe export`");
  }
  ModelInfo info{program.count("get_max_seq_len"),
                 program.count("get_max_prefill_tokens"),
                 program.count("get_max_sequences"),
                 program.count("get_page_size"),
                 program.count("get_max_pages"),
                 program.has("get_draft_tokens") ? program.count("get_draft_tokens") : 0,
                 program.has("get_draft_tokens") ? program.count("get_draft_sequences") : 0,
                 program.has("get_score_tokens") ? program.count("get_score_tokens") : 0,
                 program.count("get_vocab_size"),
                 program.count("get_n_layers"),
                 {},
                 {}};
  const std::string eos_ids = program.text("get_eos_ids");
  info.eos_ids = in_file(program.path() + ": get_eos_ids",
                         [&] { return parse_json(eos_ids).get<std::vector<int64_t>>(); });
  for (const auto& [name, value, least] :
       {std::tuple{"get_max_seq_len", info.max_seq_len, int64_t{1}},
        std::tuple{"get_max_prefill_tokens", info.max_prefill_tokens, int64_t{2}},
        std::tuple{"get_max_sequences", info.max_sequences, int64_t{1}},
        std::tuple{"get_page_size", info.page_size, int64_t{1}}}) {
    if (value < least) {
      throw std::runtime_error(program.path() + ": " + name + " is " + std::to_string(value) +
                               ", expected at least " + std::to_string(least));
    }
  }
  if (info.draft_tokens > kMostDrafts) {
    throw std::runtime_error(program.path() + ": get_draft_tokens is " +
                             std::to_string(info.draft_tokens) + ", expected at most " +
                             std::to_string(kMostDrafts));
  }
  const bool has_drafts = program.has("get_draft_tokens");
  if (has_drafts && (info.draft_sequences < 1 || info.draft_sequences > info.max_sequences)) {
    throw std::runtime_error(program.path() + ": get_draft_sequences is " +
                             std::to_string(info.draft_sequences) + ", expected 1 to " +
                             std::to_string(info.max_sequences) + ", which get_max_sequences is");
  }
  if (info.score_tokens > info.max_prefill_tokens) {
    throw std::runtime_error(program.path() + ": get_score_tokens is " +
                             std::to_string(info.score_tokens) + ", expected at most " +
                             std::to_string(info.max_prefill_tokens) +
                             ", which get_max_prefill_tokens is");
  }
  // Drafts behind those that are fed lie behind the last token, too.
  const int64_t tokens = info.max_seq_len + 2 * info.draft_tokens;
  const int64_t pages = (tokens + info.page_size - 1) / info.page_size;
  if (info.max_pages != pages) {
    throw std::runtime_error(
        program.path() + ": get_max_pages is " + std::to_string(info.max_pages) + ", expected " +
        std::to_string(pages) + " for get_max_seq_len " + std::to_string(info.max_seq_len));
  }
  return info;
}

Model::Model(const std::string& pte_path, const std::string& ptd_path, const ModelOptions& options)
    : program_(pte_path) {
  info_ = read_info(program_);
  inputs_.emplace(static_cast<size_t>(info_.max_sequences),
                  static_cast<size_t>(info_.max_prefill_tokens),
                  static_cast<size_t>(info_.draft_tokens), static_cast<size_t>(info_.max_pages));
  const std::string backend = program_.text("get_backend"), text = program_.text("get_bindings");
  info_.backend =
      in_file(pte_path + ": get_backend", [&] { return parse_json(backend).get<std::string>(); });
  device_ = in_file(pte_path, [&] { return make_device(info_.backend, options.device); });
  const Bindings bindings =
      in_file(pte_path + ": get_bindings", [&] { return Bindings::parse(text); });
  in_file(pte_path, [&] { check_methods(bindings); });
  inputs_->allocate();
  weights_.emplace(ptd_path, bindings.weights,
                   Fingerprint{pte_path, program_.text("get_fingerprint")});
  device_->load(program_, bindings, *weights_);
  allocate(options, bindings);
}

Model::~Model() = default;

void Model::check_methods(const Bindings& bindings) const {
  const auto most_tokens = static_cast<int32_t>(info_.max_prefill_tokens);
  const auto most_sequences = static_cast<int32_t>(info_.max_sequences);
  const auto most_drafts = static_cast<int32_t>(info_.draft_tokens);
  const auto score = static_cast<int32_t>(info_.score_tokens);
  const SizeRange one{1, 1}, several{2, most_sequences}, drafts{1 + most_drafts, 1 + most_drafts};
  std::vector<std::tuple<std::string, SizeRange, SizeRange, int64_t>> methods = {
      {kPrefill, one, {2, most_tokens}, 0}, {kDecode, one, one, 0}};
  if (score > 0) methods.push_back({kScore, one, {score, score}, 0});
  if (most_sequences > 1) methods.push_back({kDecodeBatch, several, one, 0});
  if (most_drafts > 0) methods.push_back({kDraftDecode, one, drafts, most_drafts});
  if (most_drafts > 0 && info_.draft_sequences > 1) {
    const SizeRange drafting{2, static_cast<int32_t>(info_.draft_sequences)};
    methods.push_back({kDraftDecodeBatch, drafting, drafts, most_drafts});
  }
  for (const auto& [name, sequences, tokens, fed] : methods) {
    const auto method = bindings.methods.find(name);
    if (method == bindings.methods.end()) throw std::runtime_error("has no method " + name);
    inputs_->check(name, method->second, sequences, tokens);
    check_outputs(name, method->second, sequences, tokens, info_.vocab_size, fed);
  }
}

}  // namespace et_moe
