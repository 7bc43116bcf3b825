#include "runner/weights.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "backends/threads.h"
#include "runner/errors.h"
#include "runner/sealed_file.h"

namespace et_moe {
namespace {

constexpr char kChecksums[] = "et_moe.checksums", kFingerprint[] = "et_moe.fingerprint";

/// Calls `task(i)` for i below `count` on all cores.
template <typename Task>
void parallel(size_t count, const Task& task) {
  std::atomic<size_t> next{0};
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  run_in_threads(std::min(count, cores), [&] {
    for (size_t i = next++; i < count; i = next++) task(i);
  });
}

}  // namespace

FlatTensorMap Weights::read(const MappedFile& file, const std::string& path) {
  check_kind(file, path, "FT01", "a FlatTensor file (.ptd)");
  const size_t covered = check_seal(file, path);
  try {
    FlatTensorMap tensors(file.data(), file.size() - kTrailerSize);
    if (covered != tensors.header_size()) {
      throw std::runtime_error("its checksum does not cover its header");
    }
    if (tensors.size() != file.size() - kTrailerSize) {
      throw std::runtime_error("there is something behind its data");
    }
    return tensors;
  } catch (const std::exception& e) {
    throw std::runtime_error(path + ": not a FlatTensor (.ptd) file, or damaged: " + e.what());
  }
}

Weights::Weights(const std::string& path, const std::vector<TensorSpec>& specs,
                 const Fingerprint& program)
    : path_(path), file_(path), tensors_(read(file_, path)) {
  const std::string differs = both_files(program.path, path) + ": they do not fit each other: ";
  for (const TensorSpec& spec : specs) {
    const auto found = tensors_.entries().find(spec.name);
    if (found == tensors_.entries().end() || !found->second.is_tensor) {
      throw std::runtime_error(differs + "the weights have no tensor " + spec.name);
    }
    const auto& [data, size, is_tensor, dtype, sizes, order] = found->second;
    if (!spec.accepts(dtype, sizes.data(), sizes.size())) {
      throw std::runtime_error(differs + "the weights have " + spec.name + " as " +
                               TensorSpec{spec.name, dtype, sizes, sizes}.describe() +
                               ", the program takes " + spec.describe());
    }
    data_.push_back(data);
  }
  verify_checksums(kFingerprint);  // what is damaged does not fit either
  check_fingerprint(program);
  verify_checksums();
}

void Weights::check_fingerprint(const Fingerprint& program) const {
  const auto found = tensors_.entries().find(kFingerprint);
  if (found == tensors_.entries().end()) {
    throw std::runtime_error(path_ +
                             ": has no fingerprint of its model; export it again with "
                             "`et-moe export`");
  }
  const auto* text = reinterpret_cast<const char*>(found->second.data);
  check_same(program, {path_, std::string(text, found->second.size)});
}

void Weights::verify_checksums(const std::string& only) const {
  const auto& entries = tensors_.entries();
  const auto checksums = entries.find(kChecksums);
  // Every entry but the checksums' own has one, in the order of the names.
  if (checksums == entries.end() || checksums->second.size != 8 * (entries.size() - 1)) {
    throw std::runtime_error(path_ + ": has no checksums of its tensors");
  }
  std::vector<std::pair<decltype(entries.begin()), const uint8_t*>> tensors;
  const uint8_t* checksum = checksums->second.data;
  for (auto entry = entries.begin(); entry != entries.end(); ++entry) {
    if (entry == checksums) continue;
    if (only.empty() || entry->first == only) tensors.emplace_back(entry, checksum);
    checksum += 8;
  }
  std::vector<char> valid(tensors.size());
  parallel(tensors.size(), [&](size_t i) {
    uint64_t expected = 0;
    const auto& [entry, checksum] = tensors[i];
    std::memcpy(&expected, checksum, 8);
    valid[i] = XXH3_64bits(entry->second.data, entry->second.size) == expected;
  });
  const auto bad = std::find(valid.begin(), valid.end(), 0);
  if (bad != valid.end()) {
    throw std::runtime_error(path_ + ": damaged: checksum mismatch of tensor " +
                             tensors[static_cast<size_t>(bad - valid.begin())].first->first);
  }
}

}  // namespace et_moe
