#include "runner/tokenizer/tokenizer_json.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>
#include <unordered_set>

namespace et_moe {
namespace {

using nlohmann::json;

constexpr uintmax_t kMaxFileBytes = 64 << 20;
constexpr int kMaxDepth = 16;
constexpr size_t kMaxExcerptBytes = 120;
constexpr size_t kMaxMessageBytes = 240;

// Schemas: per key the values allowed, or the type that the value must have ("any": it is checked
// later). A key may be left out where null is allowed. Flags that only influence offsets into the
// text may be true or false.
const json& schema(const char* name) {
  static const json schemas = json::parse(R"({
    "file": {
      "version": ["1.0"], "truncation": [null], "padding": [null], "added_tokens": "array",
      "normalizer": [null, {"type": "NFC"}], "pre_tokenizer": "object",
      "post_processor": "any", "decoder": "object", "model": "object"},
    "sequence": {"type": ["Sequence"], "pretokenizers": "array"},
    "split": {
      "type": ["Split"], "pattern": "object", "behavior": ["Isolated"], "invert": [false]},
    "pattern": {"Regex": "string"},
    "byte_level_pre_tokenizer": {
      "type": ["ByteLevel"], "add_prefix_space": [false], "trim_offsets": [false, true],
      "use_regex": [false]},
    "byte_level": {
      "type": ["ByteLevel"], "add_prefix_space": [false, true], "trim_offsets": [false, true],
      "use_regex": [null, false, true]},
    "model": {
      "type": ["BPE"], "dropout": [null], "unk_token": [null],
      "continuing_subword_prefix": [null, ""], "end_of_word_suffix": [null, ""],
      "fuse_unk": [null, false], "byte_fallback": [null, false],
      "ignore_merges": [null, false, true], "vocab": "object", "merges": "array"},
    "added_token": {
      "id": "number", "content": "string", "single_word": [false, true],
      "lstrip": [false, true], "rstrip": [false, true], "normalized": [false, true], "special": [false, true]}
  })");
  return schemas.at(name);
}

std::string excerpt(const json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  if (text.size() > kMaxExcerptBytes) text.replace(kMaxExcerptBytes, std::string::npos, "...");
  return text;
}

[[noreturn]] void fail(const std::string& key, const std::string& message) {
  throw std::runtime_error(key + ": " + message);
}

std::string element(const std::string& key, size_t index) {
  return key + "[" + std::to_string(index) + "]";
}

/// Checks an object against a schema: afterwards its keys can be used without further tests.
void check(const json& object, const std::string& key, const char* schema_name) {
  const json& rules = schema(schema_name);
  const std::string prefix = key.empty() ? "" : key + ".";
  if (!object.is_object()) fail(key.empty() ? "file" : key, "expected an object");
  for (const auto& item : object.items()) {
    if (!rules.contains(item.key())) fail(prefix + excerpt(item.key()), "key is not supported");
  }
  for (const auto& [name, rule] : rules.items()) {
    static const json null;
    const auto found = object.find(name);
    const json& value = found == object.end() ? null : *found;
    const auto equals = [&](const json& choice) { return choice == value; };
    const bool allowed = rule.is_array() ? std::any_of(rule.begin(), rule.end(), equals)
                                         : rule == "any" || rule == value.type_name();
    if (allowed) continue;
    const std::string problem =
        found == object.end() ? "missing" : excerpt(value) + " not supported";
    fail(prefix + name, problem + ", expected " + rule.dump());
  }
}

/// The greatest depth of arrays and objects if `text` is JSON; parsing finds out whether it is.
int depth_of(std::string_view text) {
  int depth = 0, greatest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') in_string = !in_string;
    if (in_string) {
      if (c == '\\') ++i;  // what is escaped may be a quotation mark
    } else if (c == '[' || c == '{') {
      greatest = std::max(greatest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return greatest;
}

json parse_file(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) fail("file", "not found or no regular file");
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error || size > kMaxFileBytes) fail("file", "larger than 64 MiB or of unknown size");
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) fail("file", "cannot be read");
  if (depth_of(text) > kMaxDepth) fail("file", "JSON nested too deeply");
  try {
    return json::parse(text);
  } catch (const json::exception& exception) {
    fail("file", std::string(exception.what()).substr(0, kMaxMessageBytes));
  }
}

Bpe::Vocabulary read_vocabulary(const json& vocab) {
  Bpe::Vocabulary vocabulary;
  vocabulary.reserve(vocab.size());
  std::vector<bool> seen(vocab.size());
  for (const auto& [token, value] : vocab.get_ref<const json::object_t&>()) {
    const auto key = [&, &token = token] { return "model.vocab." + excerpt(token); };
    if (!value.is_number_unsigned() || value.get<uint64_t>() >= seen.size()) {
      fail(key(), excerpt(value) + " is no id below the number of tokens");
    }
    const auto id = value.get<int32_t>();
    if (seen[id]) fail(key(), "id " + std::to_string(id) + " is used twice");
    seen[id] = true;
    vocabulary.emplace(token, id);
  }
  return vocabulary;
}

/// Merges are pairs of tokens, or in older files strings with one space between the tokens.
Bpe::Merges read_merges(const json& items) {
  Bpe::Merges merges;
  merges.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const json& item = items[i];
    if (item.is_array() && item.size() == 2 && item[0].is_string() && item[1].is_string()) {
      merges.emplace_back(item[0].get<std::string>(), item[1].get<std::string>());
      continue;
    }
    const std::string pair = item.is_string() ? item.get<std::string>() : "";
    const size_t space = pair.find(' ');
    if (space == std::string::npos || pair.find(' ', space + 1) != std::string::npos) {
      fail(element("model.merges", i),
           excerpt(item) + R"( is neither ["left", "right"] nor "left right")");
    }
    merges.emplace_back(pair.substr(0, space), pair.substr(space + 1));
  }
  return merges;
}

std::vector<AddedToken> read_added_tokens(const json& items, const Bpe::Vocabulary& vocabulary) {
  std::vector<AddedToken> tokens;
  std::unordered_set<std::string> contents;
  auto next_id = static_cast<int64_t>(vocabulary.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const json& item = items[i];
    const std::string key = element("added_tokens", i);
    check(item, key, "added_token");
    const auto content = item["content"].get<std::string>();
    if (content.empty()) fail(key + ".content", "empty");
    if (!contents.insert(content).second)
      fail(key + ".content", excerpt(content) + " is there twice");
    // Hugging Face assigns ids by this rule, whatever the file says.
    const auto known = vocabulary.find(content);
    const int64_t id = known == vocabulary.end() ? next_id++ : known->second;
    if (item["id"] != id) {
      fail(key + ".id",
           excerpt(item["id"]) + ", expected " + std::to_string(id) + " for " + excerpt(content));
    }
    const auto flag = [&](const char* name) { return item[name].get<bool>(); };
    tokens.push_back({id, content, flag("special"), flag("normalized"), flag("single_word"),
                      flag("lstrip"), flag("rstrip")});
  }
  return tokens;
}

std::string read_pattern(const json& pre_tokenizer) {
  check(pre_tokenizer, "pre_tokenizer", "sequence");
  const std::string key = "pre_tokenizer.pretokenizers";
  const json& steps = pre_tokenizer["pretokenizers"];
  if (steps.size() != 2) fail(key, "expected two: Split and ByteLevel");
  check(steps[0], element(key, 0), "split");
  check(steps[0]["pattern"], element(key, 0) + ".pattern", "pattern");
  check(steps[1], element(key, 1), "byte_level_pre_tokenizer");
  return steps[0]["pattern"]["Regex"].get<std::string>();
}

}  // namespace

TokenizerSpec read_tokenizer_json(const std::string& path) {
  const json file = parse_file(path);
  check(file, "", "file");
  check(file["model"], "model", "model");
  check(file["decoder"], "decoder", "byte_level");
  const auto post_processor = file.find("post_processor");
  if (post_processor != file.end() && !post_processor->is_null()) {
    check(*post_processor, "post_processor", "byte_level");
  }
  const json& model = file["model"];
  TokenizerSpec spec;
  spec.nfc = !file.value("normalizer", json()).is_null();
  spec.pattern = read_pattern(file["pre_tokenizer"]);
  spec.vocabulary = read_vocabulary(model["vocab"]);
  spec.merges = read_merges(model["merges"]);
  spec.ignore_merges = model.value("ignore_merges", json()) == true;
  spec.added_tokens = read_added_tokens(file["added_tokens"], spec.vocabulary);
  return spec;
}

}  // namespace et_moe
