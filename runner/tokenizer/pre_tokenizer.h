// The regular expression that cuts text into the pieces that BPE merges within.
#pragma once

#include <cstdint>
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
/// repeats (of counts below 100), and the case-insensitive group of English contractions
/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)`. Character classes are those of Unicode 16, by PCRE2 and
/// unicode_ranges.h together.
class PreTokenizer {
 public:
  /// Throws std::runtime_error if the pattern is malformed, uses anything else or can match nothing
  /// at all (an empty string).
  explicit PreTokenizer(const std::string& pattern);

  /// How much work matching a text of `bytes` bytes may be, however it is cut up into calls of
  /// `split`. A step is one element of the pattern that is tried, or one byte that an element
  /// takes or gives back. Qwen's patterns need at most 32 steps a byte; this is several times
  /// that, and seconds for the largest prompts.
  static uint64_t step_limit(size_t bytes);

  /// The consecutive pieces that together are `text` (well-formed UTF-8): matches, and what lies
  /// between them. Takes the steps that it needs off `steps_left`. Throws std::runtime_error that
  /// names the pattern if there are not enough left, because the pattern backtracks or looks far
  /// ahead again and again, or if the matcher needs too much memory. May be called by several
  /// threads.
  std::vector<std::string_view> split(std::string_view text, uint64_t& steps_left) const;

 private:
  [[noreturn]] void fail(const std::string& message) const;

  struct CodeDeleter {
    void operator()(pcre2_real_code_8* code) const;
  };
  std::string pattern_;
  std::unique_ptr<pcre2_real_code_8, CodeDeleter> code_;
};

}  // namespace et_moe
