#include "runner/tokenizer/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>

#include "runner/tokenizer/unicode_ranges.h"
#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

// The elements of a pattern that PCRE2 and Oniguruma agree on.
constexpr char kSupportedPattern[] = R"re((?x) \A (?:
    \Q(?i:'s|'t|'re|'ve|'m|'ll|'d)\E                              # English contractions
  | \( (?: \?[:=!] | (?![?*]) ) | [)|]                            # groups, but no verbs: (*X)
  | \[ \^? (?: \\[sSrnt] | \\p\{[LMN]\} | (?![][\\^&-])[ -~] )+ \]
  | \\[sSrnt] | \\p\{[LMN]\}
  | [?*+][?+]? (?![?*+{])                                         # repeats
  | \{ \d\d? (?:,(?:\d\d?)?)? \} (?![?*+{])
  | (?![][\\^$.|?*+(){}])[ -~]                                    # literals
)*+ \z)re";

constexpr uint32_t kHeapLimitKib = 256 * 1024;
constexpr uint64_t kStepsPerCall = 10'000'000, kStepsPerByte = 200;
constexpr size_t kMaxExcerptBytes = 200;  // Qwen's patterns have 122

struct MatchDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
using MatchData = std::unique_ptr<pcre2_match_data, MatchDeleter>;
using MatchContext = std::unique_ptr<pcre2_match_context, MatchDeleter>;

PCRE2_SPTR bytes_of(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

std::string message_of(int error) {
  PCRE2_UCHAR message[256];
  pcre2_get_error_message(error, message, sizeof message);
  return reinterpret_cast<const char*>(message);
}

/// The pattern for a message of one line.
std::string excerpt(std::string pattern) {
  if (pattern.size() > kMaxExcerptBytes)
    pattern.replace(kMaxExcerptBytes, std::string::npos, "...");
  const auto prints = [](char c) { return c >= ' ' && c <= '~'; };
  std::replace_if(pattern.begin(), pattern.end(), std::not_fn(prints), '?');
  return pattern;
}

pcre2_code* compile(std::string_view pattern, uint32_t options = 0) {
  int error = 0;
  size_t offset = 0;
  pcre2_code* code = pcre2_compile(bytes_of(pattern), pattern.size(),
                                   PCRE2_UTF | PCRE2_UCP | options, &error, &offset, nullptr);
  if (code == nullptr) {
    throw std::runtime_error("invalid regular expression: " + message_of(error) + " at offset " +
                             std::to_string(offset));
  }
  return code;
}

/// What is left of a limit on steps, and where the matcher was when it was last asked.
struct StepCounter {
  uint64_t& steps_left;
  size_t position;

  /// PCRE2 calls this before each element of the pattern that it tries. PCRE2's own limit counts
  /// afresh for every match, and not how far an element like `a*` runs.
  static int count(pcre2_callout_block* block, void* self) {
    auto& counter = *static_cast<StepCounter*>(self);
    const auto [low, high] = std::minmax({counter.position, size_t{block->current_position}});
    const uint64_t steps = 1 + high - low;
    if (steps > counter.steps_left) return PCRE2_ERROR_CALLOUT;
    counter.steps_left -= steps;
    counter.position = block->current_position;
    return 0;
  }
};

/// A character that PCRE2 puts into the class that `code_point` has for Hugging Face, with a UTF-8
/// form of the same length; empty where PCRE2 needs no help.
std::string_view stand_in(char32_t code_point, size_t length) {
  const CharacterClassRange* range = find_range(kClassesUnknownToPcre2, code_point);
  if (range == nullptr) return {};
  switch (range->general_category) {
    case 'L':
      return length == 3 ? "\xE4\xB8\x80" : "\xF0\xA0\x80\x80";  // U+4E00, U+20000
    case 'M':
      return length == 3 ? "\xE0\xA4\x80" : "\xF0\x9D\x85\xA5";  // U+0900, U+1D165
    case 'N':
    case 'O':
      return "\xF0\x9D\x9F\x8E";  // U+1D7CE
    default:
      return "\xE2\x80\x8B";  // U+200B, a format character
  }
}

/// `text` with stand-ins put in.
std::string with_stand_ins(std::string_view text) {
  std::string result(text);
  for (size_t pos = 0; pos < text.size();) {
    const Utf8Sequence sequence = read_utf8(text, pos);
    const std::string_view other = stand_in(sequence.code_point, sequence.length);
    if (!other.empty()) result.replace(pos, sequence.length, other);
    pos += sequence.length;
  }
  return result;
}

}  // namespace

void PreTokenizer::CodeDeleter::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

PreTokenizer::PreTokenizer(const std::string& pattern)
    : pattern_(pattern), code_(compile(pattern, PCRE2_AUTO_CALLOUT)) {
  const std::unique_ptr<pcre2_code, CodeDeleter> supported(compile(kSupportedPattern));
  const MatchData data(pcre2_match_data_create(1, nullptr));
  if (pcre2_match(supported.get(), bytes_of(pattern), pattern.size(), 0, 0, data.get(), nullptr) <
      0) {
    throw std::runtime_error("regular expression uses unsupported syntax: " + excerpt(pattern));
  }
  uint32_t matches_empty = 0;
  pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) {
    throw std::runtime_error("regular expression can match an empty string: " + excerpt(pattern));
  }
  pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where it fails, pcre2_match interprets
}

void PreTokenizer::fail(const std::string& message) const {
  throw std::runtime_error("regular expression of the pre-tokenizer: " + excerpt(pattern_) + ": " +
                           message);
}

uint64_t PreTokenizer::step_limit(size_t bytes) {
  return kStepsPerCall + kStepsPerByte * uint64_t{bytes};
}

std::vector<std::string_view> PreTokenizer::split(std::string_view text,
                                                  uint64_t& steps_left) const {
  const std::string subject = with_stand_ins(text);
  const MatchData data(pcre2_match_data_create(1, nullptr));
  const MatchContext context(pcre2_match_context_create(nullptr));
  if (data == nullptr || context == nullptr) fail("out of memory");
  StepCounter counter{steps_left, 0};
  pcre2_set_callout(context.get(), StepCounter::count, &counter);
  pcre2_set_match_limit(context.get(), UINT32_MAX);  // the steps are what is limited
  pcre2_set_depth_limit(context.get(), UINT32_MAX);  // memory is bounded by the heap limit
  pcre2_set_heap_limit(context.get(), kHeapLimitKib);
  const auto match_from = [&](size_t pos, uint32_t options) {
    counter.position = pos;
    return pcre2_match(code_.get(), bytes_of(subject), subject.size(), pos,
                       PCRE2_NO_UTF_CHECK | options, data.get(), context.get());
  };

  std::vector<std::string_view> pieces;
  size_t pos = 0;
  while (pos < text.size()) {
    int status = match_from(pos, 0);
    if (status == PCRE2_ERROR_JIT_STACKLIMIT) status = match_from(pos, PCRE2_NO_JIT);
    if (status == PCRE2_ERROR_NOMATCH) break;
    if (status == PCRE2_ERROR_CALLOUT) fail("takes too many steps: it backtracks too much");
    if (status < 0) fail(message_of(status));
    const size_t* match = pcre2_get_ovector_pointer(data.get());
    if (match[0] > pos) pieces.push_back(text.substr(pos, match[0] - pos));
    pieces.push_back(text.substr(match[0], match[1] - match[0]));
    pos = match[1];
  }
  if (pos < text.size()) pieces.push_back(text.substr(pos));
  return pieces;
}

}  // namespace et_moe
