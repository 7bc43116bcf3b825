#include "runner/tokenizer/tokenizer_json.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string_view>
#include <unordered_set>

#include "backends/json.h"
#include "backends/messages.h"

namespace et_moe {
namespace {

using nlohmann::json;

constexpr uintmax_t kMaxFileBytes = 64 << 20;
constexpr int kMaxDepth = 16;
constexpr size_t kMaxExcerptBytes = 120;

// What GPT-2's pre-tokenizer ByteLevel splits by if its use_regex is true, and a pattern that keeps
// text whole if it is false.
constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kWholeTextPattern = R"([\s\S]+)";

// Schemas: per key the values allowed, or the type that the value must have ("any": it is checked
// later, or has no influence on ids). A key may be left out where null is allowed. Flags that only
// influence offsets into the text may be true or false.
const json& schema(const char* name) {
  static const json schemas = parse_json(R"({
    "file": {
      "version": ["1.0"], "truncation": "any", "padding": "any", "added_tokens": "array",
      "normalizer": "any", "pre_tokenizer": "object", "post_processor": "any",
      "decoder": "object", "model": "object"},
    "normalizers": {"type": ["Sequence"], "normalizers": "array"},
    "pretokenizers": {"type": ["Sequence"], "pretokenizers": "array"},
    "processors": {"type": ["Sequence"], "processors": "array"},
    "decoders": {"type": ["Sequence"], "decoders": "array"},
    "nfc": {"type": ["NFC"]},
    "split": {
      "type": ["Split"], "pattern": "object", "behavior": ["Isolated"], "invert": [false]},
    "pattern": {"Regex": "string"},
    "byte_level_after_split": {
      "type": ["ByteLevel"], "add_prefix_space": [false], "trim_offsets": [false, true],
      "use_regex": [false]},
    "byte_level_alone": {
      "type": ["ByteLevel"], "add_prefix_space": [false], "trim_offsets": [false, true],
      "use_regex": [null, false, true]},
    "processor": {
      "type": ["ByteLevel", "TemplateProcessing"], "add_prefix_space": [false, true],
      "trim_offsets": [false, true], "use_regex": [null, false, true]},
    "template": {
      "type": ["TemplateProcessing"], "single": "array", "pair": "array",
      "special_tokens": "object"},
    "decoder": {
      "type": ["ByteLevel"], "add_prefix_space": [false, true],
      "trim_offsets": [false, true], "use_regex": [null, false, true]},
    "model": {
      "type": ["BPE"], "dropout": [null], "unk_token": [null],
      "continuing_subword_prefix": [null, ""], "end_of_word_suffix": [null, ""],
      "fuse_unk": [null, false], "byte_fallback": [null, false],
      "ignore_merges": [null, false, true], "vocab": "object", "merges": "array"},
    "added_token": {
      "id": "number", "content": "string", "single_word": [false, true],
      "lstrip": [false, true], "rstrip": [false, true], "normalized": [false, true],
      "special": [false, true]}
  })");
  return schemas.at(name);
}

std::string excerpt(const json& value) {
  std::string text = to_ascii(value);
  if (text.size() > kMaxExcerptBytes) text.replace(kMaxExcerptBytes, std::string::npos, "...");
  return text;
}

/// Of the file itself where `key` is empty.
[[noreturn]] void fail(const std::string& key, const std::string& message) {
  throw std::runtime_error(key.empty() ? message : key + ": " + message);
}

std::string element(const std::string& key, size_t index) {
  return key + "[" + std::to_string(index) + "]";
}

/// Checks an object against a schema: afterwards its keys can be used without further tests.
void check(const json& object, const std::string& key, const char* schema_name) {
  const json& rules = schema(schema_name);
  const std::string prefix = key.empty() ? "" : key + ".";
  if (!object.is_object()) fail(key, "expected an object");
  const auto check_rule = [&](const std::string& name, const json& rule) {
    static const json null;
    const auto found = object.find(name);
    const json& value = found == object.end() ? null : *found;
    const auto equals = [&](const json& choice) { return choice == value; };
    const bool allowed = rule.is_array() ? std::any_of(rule.begin(), rule.end(), equals)
                                         : rule == "any" || rule == value.type_name();
    if (allowed) return;
    const std::string problem =
        found == object.end() ? "missing" : excerpt(value) + " not supported";
    fail(prefix + name, problem + ", expected " + to_text(rule));
  };
  // The type comes first: where it is wrong, so are the other keys.
  if (rules.contains("type")) check_rule("type", rules["type"]);
  for (const auto& item : object.items()) {
    if (!rules.contains(item.key())) fail(prefix + excerpt(item.key()), "key is not supported");
  }
  for (const auto& [name, rule] : rules.items()) check_rule(name, rule);
}

/// A part of a component: its value and the key that leads to it.
struct Step {
  const json& value;
  std::string key;
};

bool has_type(const json& component, const char* type) {
  const auto found = component.is_object() ? component.find("type") : component.end();
  return found != component.end() && *found == type;
}

void append_steps(const json& component, const std::string& key, const char* list,
                  std::vector<Step>& steps) {
  if (!has_type(component, "Sequence")) {
    steps.push_back({component, key});
    return;
  }
  check(component, key, list);
  const json& items = component[list];
  for (size_t i = 0; i < items.size(); ++i) {
    append_steps(items[i], element(key + "." + list, i), list, steps);
  }
}

/// What a component does step by step: the items of its `list` if it is a Sequence (which may hold
/// others), itself if it is anything else, nothing if it is null.
std::vector<Step> steps_of(const json& component, const std::string& key, const char* list) {
  std::vector<Step> steps;
  if (!component.is_null()) append_steps(component, key, list, steps);
  return steps;
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
  const auto status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::none) fail("", error.message());
  if (!std::filesystem::exists(status)) fail("", "no such file");
  if (!std::filesystem::is_regular_file(status)) fail("", "not a regular file");
  const uintmax_t size = std::filesystem::file_size(path, error);
  if (error || size > kMaxFileBytes) fail("", "larger than 64 MiB or of unknown size");
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) fail("", "cannot be read");
  // The parser would take it for the end.
  if (text.find('\0') != std::string::npos) fail("", "not JSON: it has a byte 0");
  if (depth_of(text) > kMaxDepth) fail("", "JSON nested too deeply");
  try {
    return parse_json(text);
  } catch (const json::exception& exception) {
    fail("", "not JSON: " + reason(exception));
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
  std::vector<size_t> new_items;  // those that the vocabulary lacks
  for (size_t i = 0; i < items.size(); ++i) {
    const json& item = items[i];
    const std::string key = element("added_tokens", i);
    check(item, key, "added_token");
    const auto content = item["content"].get<std::string>();
    if (content.empty()) fail(key + ".content", "empty");
    if (!item["id"].is_number_unsigned()) fail(key + ".id", excerpt(item["id"]) + " is no id");
    if (!contents.insert(content).second) {
      fail(key + ".content", excerpt(content) + " is there twice");
    }
    const auto known = vocabulary.find(content);
    if (known == vocabulary.end()) {
      new_items.push_back(i);
    } else if (item["id"] != known->second) {
      fail(key + ".id", excerpt(item["id"]) + ", expected " + std::to_string(known->second) +
                            ", which " + excerpt(content) + " has in model.vocab");
    }
    const auto flag = [&](const char* name) { return item[name].get<bool>(); };
    tokens.push_back({item["id"].get<int64_t>(), content, flag("special"), flag("normalized"),
                      flag("single_word"), flag("lstrip"), flag("rstrip")});
  }
  // Hugging Face's library numbers new tokens from the vocabulary's size on, and its Qwen
  // tokenizers add them in the order of their ids. With other ids nobody could say which is right.
  const uint64_t first = vocabulary.size(), end = first + new_items.size();
  std::vector<bool> seen(new_items.size());
  for (const size_t i : new_items) {
    const auto id = items[i]["id"].get<uint64_t>();
    const std::string key = element("added_tokens", i) + ".id";
    if (id < first || id >= end) {
      fail(key, std::to_string(id) + ", expected " + std::to_string(first) + " to " +
                    std::to_string(end - 1) + " for the tokens that model.vocab lacks");
    }
    if (seen[id - first]) fail(key, std::to_string(id) + " is used twice");
    seen[id - first] = true;
  }
  return tokens;
}

/// Sets the pattern that text is split by, and the key that it comes from.
void read_pre_tokenizer(const json& pre_tokenizer, TokenizerSpec& spec) {
  const auto steps = steps_of(pre_tokenizer, "pre_tokenizer", "pretokenizers");
  if (steps.size() == 1) {
    const auto& [byte_level, key] = steps[0];
    check(byte_level, key, "byte_level_alone");
    const bool splits = byte_level.value("use_regex", json()) != false;
    spec.pattern = splits ? kGpt2Pattern : kWholeTextPattern;
    spec.pattern_key = key;
    return;
  }
  if (steps.size() != 2) {
    fail("pre_tokenizer", std::to_string(steps.size()) +
                              " pretokenizers, expected Split and ByteLevel, or ByteLevel alone");
  }
  const auto& [split, key] = steps[0];
  check(split, key, "split");
  check(split["pattern"], key + ".pattern", "pattern");
  check(steps[1].value, steps[1].key, "byte_level_after_split");
  spec.pattern = split["pattern"]["Regex"].get<std::string>();
  spec.pattern_key = key + ".pattern.Regex";
}

/// A post-processor has no influence on ids unless it is a template that adds tokens.
void check_post_processor(const json& post_processor) {
  for (const auto& [processor, key] : steps_of(post_processor, "post_processor", "processors")) {
    if (!has_type(processor, "TemplateProcessing")) {
      check(processor, key, "processor");
      continue;
    }
    check(processor, key, "template");
    const json& single = processor["single"];
    for (size_t i = 0; i < single.size(); ++i) {
      if (single[i].is_object() && single[i].contains("SpecialToken")) {
        fail(element(key + ".single", i),
             excerpt(single[i]) + " adds a token, expected the text alone: Sequence A");
      }
    }
    const json text = json::array({{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}});
    if (single != text) {
      fail(key + ".single", excerpt(single) + " not supported, expected " + to_text(text));
    }
  }
}

}  // namespace

TokenizerSpec read_tokenizer_json(const std::string& path) {
  const json file = parse_file(path);
  check(file, "", "file");
  const json& model = file["model"];
  check(model, "model", "model");
  const auto component = [&](const char* name) { return file.value(name, json()); };

  TokenizerSpec spec;
  const json normalizer = component("normalizer");
  for (const auto& [step, key] : steps_of(normalizer, "normalizer", "normalizers")) {
    check(step, key, "nfc");
    spec.nfc = true;
  }
  read_pre_tokenizer(file["pre_tokenizer"], spec);
  check_post_processor(component("post_processor"));
  const auto decoders = steps_of(file["decoder"], "decoder", "decoders");
  if (decoders.size() != 1) {
    fail("decoder", std::to_string(decoders.size()) + " decoders, expected one ByteLevel");
  }
  check(decoders[0].value, decoders[0].key, "decoder");
  spec.vocabulary = read_vocabulary(model["vocab"]);
  spec.merges = read_merges(model["merges"]);
  spec.ignore_merges = model.value("ignore_merges", json()) == true;
  spec.added_tokens = read_added_tokens(file["added_tokens"], spec.vocabulary);
  return spec;
}

}  // namespace et_moe
