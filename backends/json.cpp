#include "backends/json.h"

namespace et_moe {

using nlohmann::json;

json parse_json(std::string_view text, const json::parser_callback_t& check) {
  return json::parse(text.begin(), text.end(), check);
}

std::string to_text(const json& value) { return value.dump(); }

std::string to_ascii(const json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
}

}  // namespace et_moe
