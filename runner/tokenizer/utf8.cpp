#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

constexpr char32_t kReplacementCharacter = 0xFFFD;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // the same in UTF-8

}  // namespace

Utf8Sequence read_utf8(std::string_view text, size_t pos) {
  const auto byte_at = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte_at(pos);
  if (lead < 0x80) return {lead, 1, Utf8Status::kValid};
  if (lead < 0xC2 || lead > 0xF4) return {kReplacementCharacter, 1, Utf8Status::kInvalid};

  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t code_point = lead & (0x7F >> length);
  // The second byte has narrower bounds where it would make an overlong form, a surrogate or a
  // code point above U+10FFFF.
  unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < length; ++i, low = 0x80, high = 0xBF) {
    if (pos + i == text.size()) return {kReplacementCharacter, i, Utf8Status::kIncomplete};
    const unsigned char next = byte_at(pos + i);
    if (next < low || next > high) return {kReplacementCharacter, i, Utf8Status::kInvalid};
    code_point = (code_point << 6) | (next & 0x3F);
  }
  return {code_point, length, Utf8Status::kValid};
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string text;
  size_t pos = 0;
  while (pos < pending_.size()) {
    const Utf8Sequence sequence = read_utf8(pending_, pos);
    if (sequence.status == Utf8Status::kIncomplete) break;
    const bool valid = sequence.status == Utf8Status::kValid;
    text += valid ? std::string_view(pending_).substr(pos, sequence.length) : kReplacement;
    pos += sequence.length;
  }
  pending_.erase(0, pos);
  return text;
}

std::string Utf8Stream::finish() {
  std::string text;
  if (!pending_.empty()) text = kReplacement;
  pending_.clear();
  return text;
}

}  // namespace et_moe
