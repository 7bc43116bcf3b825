// The regular expression that cuts text into the pieces that BPE merges within.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;

namespace et_moe {

/// Hugging Face's `pre_tokenizers.Split(Regex(pattern), behavior="isolated")` over PCRE2.
///
/// Hugging Face matches with Oniguruma. To give its result, a pattern may use only what means the
/// same to both (all that Qwen's patterns use): printable ASCII literals, `\s \S \r \n \t`,
/// `\p{L} \p{M} \p{N}`, sets of these, groups, lookahead, alternation, greedy, lazy and possessive
/// repeats, and the case-insensitive group of English contractions `(?i:'s|'t|'re|'ve|'m|'ll|'d)`.
/// Character classes are those of Unicode 16, by PCRE2 and unicode_ranges.h together.
class PreTokenizer {
 public:
  /// Throws std::runtime_error if the pattern is malformed, uses anything else or can match nothing
  /// at all (an empty string).
  explicit PreTokenizer(const std::string& pattern);

  /// The consecutive pieces that together are `text` (well-formed UTF-8): matches, and what lies
  /// between them. With Qwen's patterns time is linear in the text and any length will do; throws
  /// std::runtime_error if another pattern exceeds PCRE2's limits. May be called by several
  /// threads.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct CodeDeleter {
    void operator()(pcre2_real_code_8* code) const;
  };
  std::unique_ptr<pcre2_real_code_8, CodeDeleter> code_;
};

}  // namespace et_moe
