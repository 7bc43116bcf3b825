#include "runner/tokenizer/added_tokens.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace et_moe {

void AddedTokenFinder::add(AddedToken token) {
  auto& tokens = by_first_byte_[static_cast<unsigned char>(token.content[0])];
  const auto longer = [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  };
  for (const AddedToken& other : tokens) {
    if (other.content != token.content) continue;
    throw std::runtime_error("added_tokens: ids " + std::to_string(other.id) + " and " +
                             std::to_string(token.id) + " have the same normalized content");
  }
  tokens.insert(std::upper_bound(tokens.begin(), tokens.end(), token, longer), std::move(token));
}

AddedTokenFinder::Match AddedTokenFinder::find(std::string_view text, size_t pos) const {
  for (; pos < text.size(); ++pos) {
    for (const AddedToken& token : by_first_byte_[static_cast<unsigned char>(text[pos])]) {
      if (text.substr(pos, token.content.size()) == token.content) {
        return {pos, pos + token.content.size(), &token};
      }
    }
  }
  return {text.size(), text.size(), nullptr};
}

}  // namespace et_moe
