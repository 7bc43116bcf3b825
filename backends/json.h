// JSON text, read and written in one place: wherever else the library's parser or writer was used,
// seconds would go into compiling it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace et_moe {

/// Parses a text as `nlohmann::json::parse` does, `check` seeing each value as it comes. Throws
/// nlohmann::json::exception, and what `check` throws.
nlohmann::json parse_json(std::string_view text,
                          const nlohmann::json::parser_callback_t& check = nullptr);

/// A value as text on one line. Throws nlohmann::json::type_error for a string that is not UTF-8.
std::string to_text(const nlohmann::json& value);

/// The same in ASCII; of strings that are not UTF-8, what is at fault becomes U+FFFD.
std::string to_ascii(const nlohmann::json& value);

}  // namespace et_moe
