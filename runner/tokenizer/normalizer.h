// Unicode normalization form C (UAX #15).
#pragma once

#include <string>
#include <string_view>

namespace et_moe {

/// The NFC form of well-formed UTF-8, as Hugging Face's `normalizers.NFC` gives it: by Unicode 9,
/// see unicode_ranges.h. Takes O(n log n) time, whatever the text.
std::string normalize_nfc(std::string_view text);

}  // namespace et_moe
