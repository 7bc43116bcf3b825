// The tensors of a `.ptd`: ExecuTorch's FlatTensor format (extension/flat_tensor/serialize), read
// with a check of everything. ExecuTorch's own reader trusts the file.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace et_moe {

/// The named blobs and tensors of a file in memory, which must outlive this.
class FlatTensorMap final : public executorch::runtime::NamedDataMap {
 public:
  /// A blob; a tensor also has a dtype and sizes, is contiguous, and aligned to 128 bytes.
  struct Entry {
    const uint8_t* data;
    size_t size;  // bytes
    bool is_tensor;
    executorch::aten::ScalarType dtype;
    std::vector<int32_t> sizes;
    std::vector<uint8_t> order;  // 0, 1, 2, ...
  };

  /// Throws std::runtime_error that says what is wrong, and with which tensor.
  FlatTensorMap(const uint8_t* data, size_t size);

  /// By name, in the order of the names' bytes.
  const std::map<std::string, Entry, std::less<>>& entries() const { return entries_; }
  /// Bytes in front of the data, and those up to the end of the data.
  size_t header_size() const { return header_size_; }
  size_t size() const { return size_; }

  executorch::runtime::Result<const executorch::runtime::TensorLayout> get_tensor_layout(
      std::string_view key) const override;
  executorch::runtime::Result<executorch::runtime::FreeableBuffer> get_data(
      std::string_view key) const override;
  executorch::runtime::Error load_data_into(std::string_view key, void* buffer,
                                            size_t size) const override;
  executorch::runtime::Result<uint32_t> get_num_keys() const override;
  executorch::runtime::Result<const char*> get_key(uint32_t index) const override;

 private:
  std::map<std::string, Entry, std::less<>> entries_;
  size_t header_size_ = 0, size_ = 0;
};

}  // namespace et_moe
