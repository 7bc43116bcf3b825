#include "runner/weights.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "runner/sealed_file.h"

namespace et_moe {
namespace {

using executorch::extension::FlatTensorDataMap;
using executorch::extension::MmapDataLoader;

constexpr char kChecksums[] = "et_moe.checksums";

/// Calls `task(i)` for i below `count` on all cores.
template <typename Task>
void parallel(size_t count, const Task& task) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) task(i);
  };
  std::vector<std::thread> threads;
  const size_t limit = std::max(1u, std::thread::hardware_concurrency());
  for (size_t i = 1; i < std::min(count, limit); ++i) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
}

}  // namespace

Weights::Weights(const std::string& path, const std::vector<TensorSpec>& specs) {
  check_seal(MappedFile(path), path);
  auto loader = MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!loader.ok()) throw std::runtime_error(path + ": cannot be mapped");
  loader_.emplace(std::move(*loader));
  auto map = FlatTensorDataMap::load(&*loader_);
  if (!map.ok()) throw std::runtime_error(path + ": not a FlatTensor (.ptd) file, or truncated");
  map_.emplace(std::move(*map));
  for (const TensorSpec& spec : specs) {
    const auto layout = map_->get_tensor_layout(spec.name);
    if (!layout.ok()) {
      throw std::runtime_error(path + ": has no tensor " + spec.name +
                               "; is it the .ptd of another model?");
    }
    const auto sizes = layout->sizes();
    const std::vector<int32_t> shape(sizes.begin(), sizes.end());
    const TensorSpec found{spec.name, layout->scalar_type(), shape, shape};
    if (!spec.accepts(found.dtype, shape.data(), shape.size())) {
      throw std::runtime_error(path + ": " + spec.name + " is " + found.describe() +
                               ", the program takes " + spec.describe() +
                               "; is it the .ptd of another model?");
    }
    auto data = map_->get_data(spec.name);
    if (!data.ok() || data->size() != spec.nbytes()) {
      throw std::runtime_error(path + ": truncated at tensor " + spec.name);
    }
    buffers_.push_back(std::move(*data));
  }
  verify_checksums(path, specs);
}

void Weights::verify_checksums(const std::string& path,
                               const std::vector<TensorSpec>& specs) const {
  const auto keys = map_->get_num_keys();
  const auto blob = map_->get_data(kChecksums);
  // Every key but the checksums' own has one.
  if (!blob.ok() || !keys.ok() || blob->size() != 8 * (static_cast<size_t>(*keys) - 1)) {
    throw std::runtime_error(path + ": has no checksums of its tensors");
  }
  std::vector<std::string> names;
  for (uint32_t i = 0; i < *keys; ++i) names.emplace_back(*map_->get_key(i));
  names.erase(std::remove(names.begin(), names.end(), kChecksums), names.end());
  std::sort(names.begin(), names.end());
  std::vector<char> valid(specs.size());
  parallel(specs.size(), [&](size_t i) {
    const auto entry = std::lower_bound(names.begin(), names.end(), specs[i].name);
    uint64_t expected = 0;
    std::memcpy(&expected, static_cast<const char*>(blob->data()) + 8 * (entry - names.begin()), 8);
    valid[i] = XXH3_64bits(buffers_[i].data(), buffers_[i].size()) == expected;
  });
  const auto bad = std::find(valid.begin(), valid.end(), 0);
  if (bad != valid.end()) {
    throw std::runtime_error(path + ": damaged: checksum mismatch of tensor " +
                             specs[static_cast<size_t>(bad - valid.begin())].name);
  }
}

}  // namespace et_moe
