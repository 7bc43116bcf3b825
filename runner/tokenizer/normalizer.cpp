#include "runner/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "runner/tokenizer/unicode_ranges.h"
#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

constexpr auto kCompose = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
constexpr unsigned char kFirstLeadByteInNfc = 0xCC;  // of U+0300; NFC keeps all that is below it

int combining_class(utf8proc_int32_t code_point) {
  return utf8proc_get_property(code_point)->combining_class;
}

/// Sorts each run of combining marks by their class. utf8proc's own ordering is quadratic in the
/// length of a run.
void order_marks(std::vector<utf8proc_int32_t>& code_points) {
  const auto is_mark = [](utf8proc_int32_t c) { return combining_class(c) != 0; };
  for (auto begin = code_points.begin(); begin != code_points.end();) {
    begin = std::find_if(begin, code_points.end(), is_mark);
    const auto end = std::find_if_not(begin, code_points.end(), is_mark);
    std::stable_sort(begin, end, [](utf8proc_int32_t a, utf8proc_int32_t b) {
      return combining_class(a) < combining_class(b);
    });
    begin = end;
  }
}

/// Orders and composes decomposed code points, appends them to `text` and clears them.
void append_composed(std::vector<utf8proc_int32_t>& code_points, std::string& text) {
  order_marks(code_points);
  const auto count = static_cast<utf8proc_ssize_t>(code_points.size());
  code_points.push_back(0);  // utf8proc_reencode writes UTF-8 in place, and a zero after it
  const utf8proc_ssize_t bytes = utf8proc_reencode(code_points.data(), count, kCompose);
  text.append(reinterpret_cast<const char*>(code_points.data()), static_cast<size_t>(bytes));
  code_points.clear();
}

}  // namespace

std::string normalize_nfc(std::string_view text) {
  const auto is_below = [](char c) { return static_cast<unsigned char>(c) < kFirstLeadByteInNfc; };
  if (std::all_of(text.begin(), text.end(), is_below)) return std::string(text);

  std::string normalized;
  std::vector<utf8proc_int32_t> code_points;
  for (size_t pos = 0; pos < text.size();) {
    const Utf8Sequence sequence = read_utf8(text, pos);
    if (find_range(kInertInNfc, sequence.code_point) != nullptr) {
      append_composed(code_points, normalized);
      normalized += text.substr(pos, sequence.length);
    } else {
      utf8proc_int32_t decomposed[4];  // the longest canonical decomposition
      const utf8proc_ssize_t count =
          utf8proc_decompose_char(static_cast<utf8proc_int32_t>(sequence.code_point), decomposed,
                                  std::size(decomposed), UTF8PROC_DECOMPOSE, nullptr);
      code_points.insert(code_points.end(), decomposed, decomposed + count);
    }
    pos += sequence.length;
  }
  append_composed(code_points, normalized);
  return normalized;
}

}  // namespace et_moe
