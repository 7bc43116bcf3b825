// Reads FlatBuffers (https://flatbuffers.dev/internals) that nobody vouches for: every access is
// checked against the buffer, so that a damaged or made-up one ends in an exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string_view>

namespace et_moe::flatbuffer {

/// The bytes of a FlatBuffer. Little-endian scalars are read as they are.
class Buffer {
 public:
  Buffer(const uint8_t* data, size_t size) : data_(data), size_(size), budget_(kShared * size) {}

  /// The scalar at an offset, which need not be aligned. Throws std::runtime_error.
  template <typename T>
  T read(size_t at) const {
    T value;
    std::memcpy(&value, bytes(at, sizeof(T)), sizeof(T));
    return value;
  }

  /// `size` bytes from an offset on. Throws std::runtime_error if there are fewer.
  const uint8_t* bytes(size_t at, size_t size) const {
    if (at > size_ || size > size_ - at) throw std::runtime_error("an offset leads out of it");
    return data_ + at;
  }

  /// Counts bytes of tables and vectors as they are visited. Things may be shared, but a small file
  /// must not stand for a huge tree: throws std::runtime_error.
  void visit(size_t size) const {
    if (size > budget_) throw std::runtime_error("its parts are shared more often than they can");
    budget_ -= size;
  }

 private:
  static constexpr size_t kShared = 16;
  const uint8_t* data_;
  size_t size_;
  mutable size_t budget_;
};

/// A vector of scalars, or of references to tables.
template <typename T>
class Vector {
 public:
  Vector() = default;
  Vector(const Buffer& buffer, size_t at) : buffer_(&buffer), at_(at + 4) {
    size_ = buffer.read<uint32_t>(at);
    buffer.bytes(at_, size_ * sizeof(T));
    buffer.visit(size_ * sizeof(T));
  }

  size_t size() const { return size_; }
  /// Throws std::runtime_error for an index out of range.
  T operator[](size_t i) const { return buffer_->read<T>(offset(i)); }
  /// Where in the buffer an element is.
  size_t offset(size_t i) const {
    if (i >= size_) throw std::runtime_error("an index is out of range");
    return at_ + i * sizeof(T);
  }
  const uint8_t* data() const { return size_ ? buffer_->bytes(at_, size_ * sizeof(T)) : nullptr; }

 private:
  const Buffer* buffer_ = nullptr;
  size_t at_ = 0, size_ = 0;
};

class Tables;

/// A table; the buffer must outlive it. Fields are named by their slot: their place in the schema,
/// where a union takes two, its type and its value. All functions throw std::runtime_error for a
/// field that leads out of the buffer.
class Table {
 public:
  /// The table that the offset at the start of the buffer leads to.
  static Table root(const Buffer& buffer) { return {buffer, buffer.read<uint32_t>(0)}; }
  Table(const Buffer& buffer, size_t at);

  template <typename T>
  T scalar(int slot, T otherwise = 0) const {
    const size_t at = field(slot);
    return at == 0 ? otherwise : buffer_->read<T>(at);
  }
  bool has(int slot) const { return field(slot) != 0; }
  /// Nothing if the table lacks the field.
  std::optional<Table> find_table(int slot) const;
  /// These throw if the table lacks the field.
  Table table(int slot) const;
  std::string_view text(int slot) const;  // a zero byte follows
  /// Empty if the table lacks the field.
  template <typename T>
  Vector<T> scalars(int slot) const {
    const size_t at = field(slot);
    return at == 0 ? Vector<T>() : Vector<T>(*buffer_, follow(at));
  }
  Tables tables(int slot) const;

 private:
  friend class Tables;
  /// Where a field is; 0 if the table lacks it.
  size_t field(int slot) const;
  size_t required(int slot) const;
  /// Where the offset that is stored at `at` leads.
  size_t follow(size_t at) const { return at + buffer_->read<uint32_t>(at); }

  const Buffer* buffer_;
  size_t at_, vtable_, vtable_size_;
};

/// A vector of tables.
class Tables {
 public:
  Tables() = default;
  Tables(const Buffer& buffer, size_t at) : buffer_(&buffer), offsets_(buffer, at) {}
  size_t size() const { return offsets_.size(); }
  Table operator[](size_t i) const {
    const size_t at = offsets_.offset(i) + offsets_[i];  // throws where there is no buffer
    return {*buffer_, at};
  }

 private:
  const Buffer* buffer_ = nullptr;
  Vector<uint32_t> offsets_;
};

}  // namespace et_moe::flatbuffer
