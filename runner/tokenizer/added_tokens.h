// Tokens that are found in the text itself, before pre-tokenization and BPE.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace et_moe {

struct AddedToken {
  int64_t id;
  std::string content;
  bool special;     // a control token, e.g. <|im_end|>, as opposed to e.g. <think>
  bool normalized;  // looked for in the normalized text, by its own normalized content
};

/// Finds added tokens: the leftmost first, and of those that start together the longest.
class AddedTokenFinder {
 public:
  struct Match {
    size_t begin, end;        // bytes of the text
    const AddedToken* token;  // null if there is none from `begin` on
  };

  /// `token.content` is not empty. Throws std::runtime_error if it was added before.
  void add(AddedToken token);

  /// The first match that begins at or after `pos`.
  Match find(std::string_view text, size_t pos) const;

 private:
  std::array<std::vector<AddedToken>, 256> by_first_byte_;  // each sorted, longest first
};

}  // namespace et_moe
