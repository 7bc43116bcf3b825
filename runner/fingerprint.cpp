#include "runner/fingerprint.h"

#include <stdexcept>

#include "backends/json.h"
#include "backends/messages.h"
#include "runner/errors.h"

namespace et_moe {
namespace {

using nlohmann::json;

json parse(const Fingerprint& fingerprint) {
  constexpr int kDeepest = 8;  // what prints or compares a value calls itself for each level
  const auto limited = [](int depth, json::parse_event_t, json&) {
    if (depth > kDeepest) throw std::runtime_error("nested too deep");
    return true;
  };
  json object;
  try {
    object = parse_json(fingerprint.text, limited);
  } catch (const std::exception& e) {
    throw std::runtime_error(fingerprint.path + ": its fingerprint cannot be read: " + reason(e));
  }
  if (!object.is_object()) {
    throw std::runtime_error(fingerprint.path + ": its fingerprint is no JSON object");
  }
  return object;
}

/// The value of a key for a message, cut short.
std::string describe(const json& object, const std::string& key) {
  constexpr size_t kLongest = 60;
  const auto found = object.find(key);
  if (found == object.end()) return "not given";
  const std::string text =
      found->dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  return text.size() <= kLongest ? text : text.substr(0, kLongest) + "...";
}

}  // namespace

void check_same(const Fingerprint& program, const Fingerprint& weights) {
  if (program.text == weights.text) return;
  const json ours = parse(program), theirs = parse(weights);
  json both = ours;
  both.update(theirs);
  for (const auto& [key, value] : both.items()) {
    const auto found = ours.find(key), other = theirs.find(key);
    if (found != ours.end() && other != theirs.end() && *found == *other) continue;
    throw std::runtime_error(
        both_files(program.path, weights.path) + ": they do not fit each other: " + key + " is " +
        describe(theirs, key) + " in the weights, the program has " + describe(ours, key));
  }
}

}  // namespace et_moe
