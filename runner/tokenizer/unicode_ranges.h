// Code points on which the libraries used here and Hugging Face's differ. A model sees the token
// ids that Hugging Face's tokenizers library made of its training text, so its view is the right
// one here, also where it lags behind the Unicode standard.
//
// The tables were made by asking the libraries about every code point, and
// tests/runner/test_tokenizer.py and test_added_tokens.py do so again: tokenizers 0.23 (Oniguruma
// and the crate regex with Unicode 16, unicode-normalization-alignments 0.1.12 with Unicode 9)
// against PCRE2 10.42 and utf8proc 2.8 (Unicode 14 and 15).
#pragma once

#include <algorithm>
#include <cstddef>

namespace et_moe {

/// The element of a sorted table that has `code_point`, or null.
template <typename Range, size_t size>
const Range* find_range(const Range (&ranges)[size], char32_t code_point) {
  const Range* range = std::lower_bound(ranges, ranges + size, code_point,
                                        [](const Range& r, char32_t c) { return r.last < c; });
  return range != ranges + size && range->first <= code_point ? range : nullptr;
}

struct CharacterClassRange {
  char32_t first, last;
  // 'L', 'M' as \p{..}; 'N': Nd or Nl; 'O': No; 'C': none of these, and no white space
  char general_category;
};

/// Letters, marks and numbers of Unicode 15 to 16, which PCRE2 10.42 knows as unassigned, and
/// U+180E, which PCRE2 counts as white space and Unicode (since 6.3) does not. Sorted; all take
/// three bytes of UTF-8 or more.
// clang-format off
inline constexpr CharacterClassRange kClassesUnknownToPcre2[] = {
    {0x897, 0x897, 'M'}, {0xCF3, 0xCF3, 'M'}, {0xECE, 0xECE, 'M'}, {0x180E, 0x180E, 'C'},
    {0x1C89, 0x1C8A, 'L'}, {0xA7CB, 0xA7CD, 'L'}, {0xA7DA, 0xA7DC, 'L'}, {0x105C0, 0x105F3, 'L'},
    {0x10D40, 0x10D49, 'N'}, {0x10D4A, 0x10D65, 'L'}, {0x10D69, 0x10D6D, 'M'},
    {0x10D6F, 0x10D85, 'L'}, {0x10EC2, 0x10EC4, 'L'}, {0x10EFC, 0x10EFF, 'M'},
    {0x1123F, 0x11240, 'L'}, {0x11241, 0x11241, 'M'}, {0x11380, 0x11389, 'L'},
    {0x1138B, 0x1138B, 'L'}, {0x1138E, 0x1138E, 'L'}, {0x11390, 0x113B5, 'L'},
    {0x113B7, 0x113B7, 'L'}, {0x113B8, 0x113C0, 'M'}, {0x113C2, 0x113C2, 'M'},
    {0x113C5, 0x113C5, 'M'}, {0x113C7, 0x113CA, 'M'}, {0x113CC, 0x113D0, 'M'},
    {0x113D1, 0x113D1, 'L'}, {0x113D2, 0x113D2, 'M'}, {0x113D3, 0x113D3, 'L'},
    {0x113E1, 0x113E2, 'M'}, {0x116D0, 0x116E3, 'N'}, {0x11BC0, 0x11BE0, 'L'},
    {0x11BF0, 0x11BF9, 'N'}, {0x11F00, 0x11F01, 'M'}, {0x11F02, 0x11F02, 'L'},
    {0x11F03, 0x11F03, 'M'}, {0x11F04, 0x11F10, 'L'}, {0x11F12, 0x11F33, 'L'},
    {0x11F34, 0x11F3A, 'M'}, {0x11F3E, 0x11F42, 'M'}, {0x11F50, 0x11F59, 'N'},
    {0x11F5A, 0x11F5A, 'M'}, {0x1342F, 0x1342F, 'L'}, {0x13440, 0x13440, 'M'},
    {0x13441, 0x13446, 'L'}, {0x13447, 0x13455, 'M'}, {0x13460, 0x143FA, 'L'},
    {0x16100, 0x1611D, 'L'}, {0x1611E, 0x1612F, 'M'}, {0x16130, 0x16139, 'N'},
    {0x16D40, 0x16D6C, 'L'}, {0x16D70, 0x16D79, 'N'}, {0x18CFF, 0x18CFF, 'L'},
    {0x1B132, 0x1B132, 'L'}, {0x1B155, 0x1B155, 'L'}, {0x1CCF0, 0x1CCF9, 'N'},
    {0x1D2C0, 0x1D2D3, 'O'}, {0x1DF25, 0x1DF2A, 'L'}, {0x1E030, 0x1E06D, 'L'},
    {0x1E08F, 0x1E08F, 'M'}, {0x1E4D0, 0x1E4EB, 'L'}, {0x1E4EC, 0x1E4EF, 'M'},
    {0x1E4F0, 0x1E4F9, 'N'}, {0x1E5D0, 0x1E5ED, 'L'}, {0x1E5EE, 0x1E5EF, 'M'},
    {0x1E5F0, 0x1E5F0, 'L'}, {0x1E5F1, 0x1E5FA, 'N'}, {0x2B739, 0x2B739, 'L'},
    {0x2EBF0, 0x2EE5D, 'L'}, {0x31350, 0x323AF, 'L'},
};
// clang-format on

struct CodePointRange {
  char32_t first, last;
};

/// What has Unicode's property White_Space.
inline constexpr CodePointRange kWhiteSpace[] = {
    {0x9, 0xD},       {0x20, 0x20},     {0x85, 0x85},     {0xA0, 0xA0},     {0x1680, 0x1680},
    {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000},
};

/// Word characters by other properties than their general category: joiners, circled letters.
inline constexpr CodePointRange kOtherWordCharacters[] = {
    {0x200C, 0x200D}, {0x24B6, 0x24E9}, {0x1F130, 0x1F149}, {0x1F150, 0x1F169}, {0x1F170, 0x1F189},
};

/// What Hugging Face's NFC (Unicode 9) leaves alone and a newer one would reorder, compose or
/// decompose; and U+11A7, which no NFC changes, but which utf8proc 2.8 drops after a Hangul
/// syllable. Sorted. Where it makes the list shorter, a range also spans code points that no NFC
/// changes. Complete up to Unicode 17.
// clang-format off
inline constexpr CodePointRange kInertInNfc[] = {
    {0x5C8, 0x5C9}, {0x7FD, 0x7FD}, {0x897, 0x8D3}, {0x9FE, 0x9FE}, {0xC3C, 0xC3C}, {0xD3B, 0xD3C},
    {0xEBA, 0xEBA}, {0x11A7, 0x11A7}, {0x1715, 0x1715}, {0x1ABF, 0x1AF0}, {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C}, {0x105C9, 0x105E4}, {0x10D24, 0x10F85}, {0x11070, 0x11070},
    {0x1133B, 0x1133B},
    {0x11382, 0x113D0}, {0x1145E, 0x1145E}, {0x11839, 0x11A99}, {0x11D42, 0x1612F},
    {0x16D63, 0x16FF1}, {0x1D127, 0x1D128}, {0x1D250, 0x1D281}, {0x1E08F, 0x1E6F5},
};
// clang-format on

}  // namespace et_moe
