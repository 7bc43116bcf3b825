#include "runner/flat_tensor.h"

#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>

#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "runner/flatbuffer.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::TensorLayout;
using flatbuffer::Buffer;
using flatbuffer::Table;

// Slots of the tables of flat_tensor.fbs.
constexpr int kVersion = 0, kSegments = 1, kNamedData = 2;     // FlatTensor
constexpr int kOffset = 0, kSize = 1;                          // DataSegment
constexpr int kKey = 0, kSegmentIndex = 1, kTensorLayout = 2;  // NamedData
constexpr int kScalarType = 0, kSizes = 1, kDimOrder = 2;      // TensorLayout

constexpr size_t kAlignment = 128;  // of tensors, as backends/sealed_file.py writes them

/// flat_tensor_header.h: it follows the root offset and the identifier.
struct Header {
  char magic[4];
  uint32_t length;
  uint64_t flatbuffer_offset, flatbuffer_size, base, data_size;
};
static_assert(sizeof(Header) == 40);

Header read_header(const Buffer& file, size_t size) {
  if (std::memcmp(file.bytes(4, 4), "FT01", 4) != 0) throw std::runtime_error("another identifier");
  const auto header = file.read<Header>(8);
  if (std::memcmp(header.magic, "FH01", 4) != 0 || header.length < sizeof(Header)) {
    throw std::runtime_error("no header");
  }
  if (header.base > size || header.data_size > size - header.base) {
    throw std::runtime_error("truncated: its data ends behind its end");
  }
  if (header.flatbuffer_offset > header.base ||
      header.flatbuffer_size > header.base - header.flatbuffer_offset) {
    throw std::runtime_error("its tables reach into its data");
  }
  return header;
}

bool is_supported(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::Half:
    case ScalarType::Float:
    case ScalarType::BFloat16:
      return true;
    default:
      return false;
  }
}

/// Dtype and sizes, which must make up the bytes that the entry has.
void read_layout(const Table& layout, FlatTensorMap::Entry& entry) {
  entry.is_tensor = true;
  entry.dtype = static_cast<ScalarType>(layout.scalar<int8_t>(kScalarType));
  if (!is_supported(entry.dtype)) throw std::runtime_error("an unknown dtype");
  const auto sizes = layout.scalars<int32_t>(kSizes);
  const auto order = layout.scalars<uint8_t>(kDimOrder);
  if (order.size() != sizes.size()) throw std::runtime_error("a dim_order of another rank");
  size_t bytes = executorch::runtime::elementSize(entry.dtype);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (order[i] != i) throw std::runtime_error("not contiguous");
    if (sizes[i] < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(sizes[i]), &bytes)) {
      throw std::runtime_error("an impossible shape");
    }
    entry.sizes.push_back(sizes[i]);
    entry.order.push_back(order[i]);
  }
  if (bytes != entry.size) throw std::runtime_error("its data has another size than its shape");
  if (reinterpret_cast<uintptr_t>(entry.data) % kAlignment != 0) {
    throw std::runtime_error("its data is not aligned to 128 bytes");
  }
}

}  // namespace

FlatTensorMap::FlatTensorMap(const uint8_t* data, size_t size) {
  const Header header = read_header(Buffer(data, size), size);
  header_size_ = header.base;
  size_ = header.base + header.data_size;
  const Buffer tables(data, header.flatbuffer_offset + header.flatbuffer_size);
  const Buffer segments(data + header.base, header.data_size);
  const Table root = Table::root(tables);
  if (root.scalar<uint32_t>(kVersion) != 0) throw std::runtime_error("another version");
  const auto places = root.tables(kSegments), named = root.tables(kNamedData);
  for (size_t i = 0; i < named.size(); ++i) {
    const std::string name(named[i].text(kKey));
    try {
      const Table place = places[named[i].scalar<uint32_t>(kSegmentIndex)];
      Entry entry{nullptr, place.scalar<uint64_t>(kSize), false, ScalarType::Byte, {}, {}};
      entry.data = segments.bytes(place.scalar<uint64_t>(kOffset), entry.size);
      if (const auto layout = named[i].find_table(kTensorLayout)) read_layout(*layout, entry);
      if (!entries_.emplace(name, std::move(entry)).second) throw std::runtime_error("named twice");
    } catch (const std::exception& e) {
      throw std::runtime_error("tensor " + name.substr(0, 200) + ": " + e.what());
    }
  }
}

Result<const TensorLayout> FlatTensorMap::get_tensor_layout(std::string_view key) const {
  const auto found = entries_.find(key);
  if (found == entries_.end() || !found->second.is_tensor) return Error::NotFound;
  const Entry& entry = found->second;
  return TensorLayout::create(Span<const int32_t>(entry.sizes.data(), entry.sizes.size()),
                              Span<const uint8_t>(entry.order.data(), entry.order.size()),
                              entry.dtype);
}

Result<FreeableBuffer> FlatTensorMap::get_data(std::string_view key) const {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return Error::NotFound;
  return FreeableBuffer(found->second.data, found->second.size, nullptr);
}

Error FlatTensorMap::load_data_into(std::string_view key, void* buffer, size_t size) const {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return Error::NotFound;
  if (size > found->second.size) return Error::InvalidArgument;
  std::memcpy(buffer, found->second.data, size);
  return Error::Ok;
}

Result<uint32_t> FlatTensorMap::get_num_keys() const {
  return static_cast<uint32_t>(entries_.size());
}

Result<const char*> FlatTensorMap::get_key(uint32_t index) const {
  if (index >= entries_.size()) return Error::InvalidArgument;
  return std::next(entries_.begin(), index)->first.c_str();
}

}  // namespace et_moe
