// UTF-8 as the Unicode standard defines it (chapter 3.9, table 3-7), and streaming output of it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace et_moe {

enum class Utf8Status {
  kValid,
  kInvalid,    // these bytes begin no code point, whatever follows
  kIncomplete  // the text ends inside a code point
};

/// One step through UTF-8 text. An ill-formed sequence is a "maximal subpart" of the standard, the
/// unit that Hugging Face's decode (Rust's `from_utf8_lossy`) replaces by one U+FFFD.
struct Utf8Sequence {
  char32_t code_point;  // U+FFFD unless kValid
  size_t length;        // bytes, at least 1
  Utf8Status status;
};

/// Reads the sequence that starts at `text[pos]`; `pos` is less than `text.size()`.
Utf8Sequence read_utf8(std::string_view text, size_t pos);

/// Turns the bytes of successive tokens into printable text: a character whose bytes are spread
/// over several tokens comes out whole, and ill-formed bytes come out as U+FFFD. All that `push`
/// and `finish` return is, put together, Hugging Face's `decode` of all tokens at once.
class Utf8Stream {
 public:
  /// Takes the next bytes; returns the text that they complete, possibly none.
  std::string push(std::string_view bytes);

  /// Returns what is left (U+FFFD for a character cut short, else nothing) and starts afresh.
  std::string finish();

 private:
  std::string pending_;  // a prefix of one code point: at most 3 bytes
};

}  // namespace et_moe
