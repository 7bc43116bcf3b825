// What the runner prints on standard output.
#pragma once

#include <cstdint>
#include <string>

#include "runner/tokenizer/tokenizer.h"
#include "runner/tokenizer/utf8.h"

namespace et_moe {

/// The reader of standard output went away: nobody wants more of it.
struct ReaderGone {};

/// Throws std::runtime_error where nothing can be written to standard output: it is closed, or open
/// for reading only.
void check_standard_output();

/// Writes to standard output and flushes it. Throws ReaderGone, or std::runtime_error for any other
/// failure.
void print(const std::string& text);

/// Prints tokens as they come: text with a tokenizer (special tokens left out), ids without. Throws
/// like `print`.
class Printer {
 public:
  /// `tokenizer` may be null.
  explicit Printer(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}
  void token(int64_t id);
  void finish() { print(stream_.finish() + "\n"); }

 private:
  const Tokenizer* tokenizer_;
  Utf8Stream stream_;
};

}  // namespace et_moe
