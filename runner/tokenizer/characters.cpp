#include "runner/tokenizer/characters.h"

#include <utf8proc.h>

#include "runner/tokenizer/unicode_ranges.h"

namespace et_moe {

bool is_word_character(char32_t code_point) {
  if (find_range(kOtherWordCharacters, code_point) != nullptr) return true;
  if (const auto* range = find_range(kClassesUnknownToPcre2, code_point)) {
    return range->general_category == 'L' || range->general_category == 'M' ||
           range->general_category == 'N';
  }
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code_point))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

bool is_white_space(char32_t code_point) { return find_range(kWhiteSpace, code_point) != nullptr; }

}  // namespace et_moe
