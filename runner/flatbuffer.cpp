#include "runner/flatbuffer.h"

namespace et_moe::flatbuffer {

Table::Table(const Buffer& buffer, size_t at) : buffer_(&buffer), at_(at) {
  const auto back = static_cast<int64_t>(at) - buffer.read<int32_t>(at);
  if (back < 0) throw std::runtime_error("an offset leads out of it");
  vtable_ = static_cast<size_t>(back);
  vtable_size_ = buffer.read<uint16_t>(vtable_);
  buffer.bytes(vtable_, vtable_size_);
  buffer.visit(sizeof(int32_t));
}

size_t Table::field(int slot) const {
  const size_t entry = 4 + 2 * static_cast<size_t>(slot);
  if (entry + sizeof(uint16_t) > vtable_size_) return 0;
  const auto offset = buffer_->read<uint16_t>(vtable_ + entry);
  return offset == 0 ? 0 : at_ + offset;
}

size_t Table::required(int slot) const {
  const size_t at = field(slot);
  if (at == 0) throw std::runtime_error("a field is missing");
  return at;
}

std::optional<Table> Table::find_table(int slot) const {
  const size_t at = field(slot);
  if (at == 0) return std::nullopt;
  return Table(*buffer_, follow(at));
}

Table Table::table(int slot) const { return {*buffer_, follow(required(slot))}; }

std::string_view Table::text(int slot) const {
  const Vector<char> characters(*buffer_, follow(required(slot)));
  const size_t size = characters.size();
  const size_t at = size == 0 ? follow(required(slot)) + 4 : characters.offset(0);
  if (*buffer_->bytes(at + size, 1) != 0) throw std::runtime_error("a text does not end");
  return {reinterpret_cast<const char*>(buffer_->bytes(at, size)), size};
}

Tables Table::tables(int slot) const {
  const size_t at = field(slot);
  return at == 0 ? Tables() : Tables(*buffer_, follow(at));
}

}  // namespace et_moe::flatbuffer
