// Tokens that are found in the text itself, before pre-tokenization and BPE.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runner/tokenizer/aho_corasick.h"

namespace et_moe {

struct AddedToken {
  int64_t id;
  std::string content;
  bool special;      // a control token, e.g. <|im_end|>, as opposed to e.g. <think>
  bool normalized;   // looked for in the normalized text, by its own normalized content
  bool single_word;  // only between characters that are no word characters
  bool lstrip;       // takes the white space before it
  bool rstrip;       // takes the white space after it
};

/// Cuts text at added tokens as Hugging Face's tokenizers does: it takes the leftmost, of those
/// that start together the longest, then leaves out those that do not count, whatever else they
/// hide.
class AddedTokenSplitter {
 public:
  struct Part {
    std::string_view text;    // not empty unless `token` is set
    const AddedToken* token;  // null for text between tokens
  };

  /// Contents are not empty. Throws std::runtime_error if two tokens have the same.
  explicit AddedTokenSplitter(std::vector<AddedToken> tokens = {});

  /// The parts of `text` (well-formed UTF-8) in order. Special tokens count only with
  /// `parse_special`. White space may belong to two parts: after a token with rstrip, a token that
  /// begins in it is found nonetheless, and what follows that one is text again. O(n) for n bytes.
  std::vector<Part> split(std::string_view text, bool parse_special) const;

 private:
  std::vector<AddedToken> tokens_;
  AhoCorasick search_;
};

}  // namespace et_moe
