#include "runner/prompts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string_view>

#include "backends/json.h"
#include "runner/errors.h"
#include "runner/files.h"

namespace et_moe {
namespace {

using nlohmann::json;

constexpr size_t kMostExcerpt = 40;  // bytes of a value that an error shows

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

/// A value as an error shows it: on one line, and not all of a long one.
std::string excerpt(const json& value) {
  if (value.is_structured()) return value.is_array() ? "a list" : "an object";
  const std::string text = to_ascii(value);
  return text.size() > kMostExcerpt ? text.substr(0, kMostExcerpt) + "..." : text;
}

[[noreturn]] void expect(const std::string& key, const char* expected, const json& value) {
  fail(key + ": expected " + expected + ", got " + excerpt(value));
}

/// The object on a line.
json parse(std::string_view line) {
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
    fail("an empty line, expected a JSON object");
  }
  // The parser would take it for the end.
  if (line.find('\0') != std::string_view::npos) fail("not JSON: it has a byte 0");
  std::set<std::string> keys;
  const auto check = [&keys](int depth, json::parse_event_t event, json& value) {
    using Event = json::parse_event_t;
    if (depth >= 2 && (event == Event::array_start || event == Event::object_start)) {
      fail("nested deeper than a list of token ids");
    }
    if (depth == 1 && event == Event::key && !keys.insert(value.get<std::string>()).second) {
      fail("the key " + excerpt(value) + " is there twice");
    }
    return true;
  };
  json object;
  try {
    object = parse_json(line, check);
  } catch (const json::parse_error& e) {
    fail("not JSON: wrong at column " + std::to_string(e.byte));
  } catch (const json::exception&) {
    fail("a number is too large");
  }
  if (!object.is_object()) fail("expected a JSON object, got " + excerpt(object));
  return object;
}

bool is_int64(const json& value) {
  return value.is_number_integer() &&
         !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
}

int64_t integer(const std::string& key, const json& value) {
  if (!is_int64(value)) expect(key, "a 64-bit integer", value);
  return value.get<int64_t>();
}

float number(const std::string& key, const json& value) {
  if (!value.is_number()) expect(key, "a number", value);
  const double wide = value.get<double>();
  if (std::abs(wide) > std::numeric_limits<float>::max()) expect(key, "a 32-bit number", value);
  return static_cast<float>(wide);
}

std::vector<int64_t> ids_of(const json& value) {
  if (!value.is_array()) expect("prompt_ids", "a list of token ids", value);
  std::vector<int64_t> ids;
  for (const json& id : value) {
    if (!is_int64(id)) {
      fail("prompt_ids: entry " + std::to_string(ids.size()) + " is not a token id");
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

std::vector<int64_t> ids_of_text(const Flags& f, const Tokenizer* tokenizer, const json& value,
                                 int64_t vocab_size) {
  if (!value.is_string()) expect("prompt", "a text", value);
  return in_context("prompt", [&] {
    return encode(f, tokenizer, value.get_ref<const std::string&>(), vocab_size);
  });
}

/// Sets the parameter that a key names.
void set(SamplingParams& p, const std::string& key, const json& value) {
  const std::map<std::string, float*> numbers = {{"temperature", &p.sampling.temperature},
                                                 {"top_p", &p.sampling.top_p},
                                                 {"min_p", &p.min_p},
                                                 {"presence_penalty", &p.presence_penalty},
                                                 {"frequency_penalty", &p.frequency_penalty},
                                                 {"repetition_penalty", &p.repetition_penalty}};
  if (const auto found = numbers.find(key); found != numbers.end()) {
    *found->second = number(key, value);
  } else if (key == "top_k") {
    p.sampling.top_k = integer(key, value);
  } else if (key == "seed") {
    p.sampling.seed = integer(key, value);
  } else if (key == "max_new_tokens") {
    p.max_tokens = integer(key, value);
  } else {
    std::string known = "prompt, prompt_ids, max_new_tokens, top_k, seed";
    for (const auto& [name, place] : numbers) known += ", " + name;
    fail("unknown key " + excerpt(key) + ", expected " + known);
  }
}

void check_limit(int64_t max_new_tokens) {
  if (max_new_tokens >= 1) return;
  fail("max_new_tokens " + std::to_string(max_new_tokens) + ": expected at least 1");
}

void check_request(const Request& request, const ModelInfo& info) {
  check_length(request.prompt_ids.size(), 0, true, info.max_seq_len);
  check_ids(request.prompt_ids, info.vocab_size, "the prompt: ");
  check_limit(*request.params.max_tokens);
  check(request.params, info.vocab_size);
}

}  // namespace

std::vector<Request> read_prompts(const Flags& f, const Tokenizer* tokenizer,
                                  const ModelInfo& info) {
  const std::string& path = *f.prompts_path;
  const GenerationConfig& defaults = f.generation;
  check_limit(defaults.max_new_tokens);
  check(defaults.sampling);
  const std::string text = read_file(path);
  if (text.empty()) fail(path + ": is empty, expected a JSON object on each line");
  std::vector<Request> requests;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    in_context(path + ":" + std::to_string(requests.size() + 1), [&] {
      const json object = parse(std::string_view(text).substr(begin, end - begin));
      if (object.contains("prompt") == object.contains("prompt_ids")) {
        fail("expected one of prompt and prompt_ids");
      }
      Request request;
      request.params.max_tokens = defaults.max_new_tokens;
      request.params.sampling = defaults.sampling;
      for (const auto& [key, value] : object.items()) {
        if (key == "prompt") {
          request.prompt_ids = ids_of_text(f, tokenizer, value, info.vocab_size);
        } else if (key == "prompt_ids") {
          request.prompt_ids = ids_of(value);
        } else {
          set(request.params, key, value);
        }
      }
      check_request(request, info);
      requests.push_back(std::move(request));
    });
    begin = end + 1;
  }
  return requests;
}

}  // namespace et_moe
