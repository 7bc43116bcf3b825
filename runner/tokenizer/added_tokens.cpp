#include "runner/tokenizer/added_tokens.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "runner/tokenizer/characters.h"
#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

std::vector<std::string_view> contents_of(const std::vector<AddedToken>& tokens) {
  std::vector<std::string_view> contents;
  std::unordered_map<std::string_view, int64_t> ids;
  for (const AddedToken& token : tokens) {
    const auto [other, is_new] = ids.emplace(token.content, token.id);
    if (!is_new) {
      throw std::runtime_error("added_tokens: ids " + std::to_string(other->second) + " and " +
                               std::to_string(token.id) + " have the same normalized content");
    }
    contents.push_back(token.content);
  }
  return contents;
}

/// Where the character before `pos` begins; `pos` is not 0.
size_t previous_character(std::string_view text, size_t pos) {
  do --pos;
  while ((static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80);
  return pos;
}

bool stands_alone(std::string_view text, size_t begin, size_t end) {
  const auto is_word_at = [&](size_t pos) {
    return is_word_character(read_utf8(text, pos).code_point);
  };
  return (begin == 0 || !is_word_at(previous_character(text, begin))) &&
         (end == text.size() || !is_word_at(end));
}

/// Finds the ends of runs of white space; remembers the last one, so that many tokens in one long
/// run do not make the search quadratic.
class WhiteSpace {
 public:
  explicit WhiteSpace(std::string_view text) : text_(text) {}

  /// The end of the white space that begins at `pos`.
  size_t end(size_t pos) {
    if (pos >= run_begin_ && pos <= run_end_) return run_end_;
    run_begin_ = run_end_ = pos;
    while (run_end_ < text_.size()) {
      const Utf8Sequence character = read_utf8(text_, run_end_);
      if (!is_white_space(character.code_point)) break;
      run_end_ += character.length;
    }
    return run_end_;
  }

  /// The beginning of the white space that ends at `pos`, or `limit` if it begins before it.
  size_t begin(size_t pos, size_t limit) const {
    while (pos > limit) {
      const size_t previous = previous_character(text_, pos);
      if (!is_white_space(read_utf8(text_, previous).code_point)) break;
      pos = previous;
    }
    return pos;
  }

 private:
  std::string_view text_;
  size_t run_begin_ = 1, run_end_ = 0;  // none
};

}  // namespace

AddedTokenSplitter::AddedTokenSplitter(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), search_(contents_of(tokens_)) {}

std::vector<AddedTokenSplitter::Part> AddedTokenSplitter::split(std::string_view text,
                                                                bool parse_special) const {
  std::vector<Part> parts;
  WhiteSpace white_space(text);
  size_t done = 0;
  const auto add_text_before = [&](size_t end) {
    if (done < end) parts.push_back({text.substr(done, end - done), nullptr});
  };
  for (const AhoCorasick::Match& match : search_.find(text)) {
    const AddedToken& token = tokens_[match.pattern];
    size_t begin = match.begin, end = begin + token.content.size();
    if (token.special && !parse_special) continue;
    if (token.single_word && !stands_alone(text, begin, end)) continue;
    if (token.lstrip) begin = white_space.begin(begin, done);
    if (token.rstrip) end = white_space.end(end);
    add_text_before(begin);
    parts.push_back({text.substr(begin, end - begin), &token});
    done = end;
  }
  add_text_before(text.size());
  return parts;
}

}  // namespace et_moe
