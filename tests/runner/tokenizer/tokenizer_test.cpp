#include "runner/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "backends/json.h"
#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

using nlohmann::json;

/// A tokenizer.json with the 256 bytes (ids 0 to 255: their values), the tokens "ab" (256), "bc",
/// "abc" and "ĠĠ" (259), the special token <|end|> (260) and the plain token <think> (261).
json make_spec() {
  json vocab;
  for (int byte = 0; byte < 256; ++byte) {
    vocab[bytes_to_alphabet(std::string(1, static_cast<char>(byte)))] = byte;
  }
  vocab["ab"] = 256;
  vocab["bc"] = 257;
  vocab["abc"] = 258;
  vocab["ĠĠ"] = 259;
  json spec = parse_json(R"re({
    "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+|[^\\s\\p{L}]+"}, "behavior": "Isolated",
       "invert": false},
      {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
    "post_processor": null,
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
    "added_tokens": [
      {"id": 260, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
       "normalized": false, "special": true},
      {"id": 261, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false,
       "normalized": false, "special": false}],
    "model": {"type": "BPE", "merges": [["b", "c"], ["a", "b"], ["a", "bc"], "Ġ Ġ"]}
  })re");
  spec["model"]["vocab"] = std::move(vocab);
  return spec;
}

Tokenizer load(const std::string& text) {
  const std::filesystem::path path =
      std::filesystem::path(testing::TempDir()) /
      (testing::UnitTest::GetInstance()->current_test_info()->name() +
       std::string(".tokenizer.json"));
  std::ofstream(path, std::ios::binary) << text;
  return Tokenizer::load(path.string());
}

class TokenizerTest : public testing::Test {
 protected:
  const Tokenizer tokenizer_ = load(to_text(make_spec()));
};

using Ids = std::vector<int64_t>;

TEST_F(TokenizerTest, MergesInOrderOfPriority) {
  EXPECT_EQ(tokenizer_.encode("abc", true), Ids({258}));
  EXPECT_EQ(tokenizer_.encode("abd", true), Ids({256, 'd'}));
  EXPECT_EQ(tokenizer_.encode("abbc", true), Ids({256, 257}));
  EXPECT_EQ(tokenizer_.encode("   a", true), Ids({259, ' ', 'a'}));
  EXPECT_EQ(tokenizer_.encode("", true), Ids());
}

TEST_F(TokenizerTest, NormalizesToNfc) {
  EXPECT_EQ(tokenizer_.encode("e\u0301", true), Ids({0xC3, 0xA9}));
}

TEST_F(TokenizerTest, ParsesSpecialTokensOnlyOnRequest) {
  EXPECT_EQ(tokenizer_.encode("a<|end|><think>", true), Ids({'a', 260, 261}));
  EXPECT_EQ(tokenizer_.encode("a<|end|><think>", false),
            Ids({'a', '<', '|', 'e', 'n', 'd', '|', '>', 261}));
}

TEST_F(TokenizerTest, KnowsItsTokens) {
  EXPECT_EQ(tokenizer_.vocab_size(), 262);
  EXPECT_EQ(tokenizer_.token_to_id("<|end|>"), 260);
  EXPECT_EQ(tokenizer_.token_to_id("ĠĠ"), 259);
  EXPECT_EQ(tokenizer_.token_to_id("  "), std::nullopt);
  EXPECT_EQ(tokenizer_.id_to_bytes(259), "  ");
  EXPECT_EQ(tokenizer_.id_to_bytes(0x80), "\x80");
  EXPECT_EQ(tokenizer_.id_to_bytes(260), "<|end|>");
  EXPECT_TRUE(tokenizer_.is_special(260));
  EXPECT_FALSE(tokenizer_.is_special(261));
  EXPECT_FALSE(tokenizer_.is_special(0));
}

TEST_F(TokenizerTest, Decodes) {
  EXPECT_EQ(tokenizer_.decode({258, 259, 0xC3, 0xA9, 260}), "abc  é<|end|>");
  EXPECT_EQ(tokenizer_.decode({0xC3, 'a', 0xE4, 0xB8}), "\uFFFDa\uFFFD");
  EXPECT_EQ(tokenizer_.decode({}), "");
}

template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

TEST_F(TokenizerTest, RefusesIdsOutOfRange) {
  for (const int64_t id : {INT64_MIN, int64_t{-1}, int64_t{262}, INT64_MAX}) {
    const std::string expected = "token id " + std::to_string(id) + ": expected 0 to 261";
    EXPECT_EQ(error_of([&] { tokenizer_.decode({0, id}); }), expected);
    EXPECT_EQ(error_of([&] { tokenizer_.id_to_bytes(id); }), expected);
    EXPECT_EQ(error_of([&] { tokenizer_.is_special(id); }), expected);
  }
}

TEST_F(TokenizerTest, RefusesTextThatIsNotUtf8) {
  for (const char* text :
       {"ab\x80", "ab\xC3", "ab\xC0\x80", "ab\xED\xA0\x80", "ab\xF4\x90\x80\x80"}) {
    EXPECT_EQ(error_of([&] { tokenizer_.encode(text, true); }), "text is not UTF-8 at byte 2");
  }
}

Tokenizer with_pattern(const std::string& pattern) {
  json spec = make_spec();
  spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern;
  return load(to_text(spec));
}

/// Patterns and texts whose matching takes exponential, cubic or quadratic time: in one match, or
/// in many that are fast one by one.
TEST(PreTokenizerTest, LimitsTheStepsOfACall) {
  const std::pair<const char*, std::string> cases[] = {
      {"(?:\\p{L}+)+\\p{N}", std::string(10'000, 'a')},
      {"(?=a*a*a*b)a|\\S", std::string(3'000, 'a')},
      {"(?=a*b)a|\\S", std::string(300'000, 'a')},
      {"(?=[^b]*+b)a|\\S", std::string(300'000, 'a')},
      {"(?=(?:a|c)++b)a|\\S", std::string(300'000, 'a')},
      {"a+?b|\\S", std::string(300'000, 'a')},
      {"\\s+\\p{N}|\\s", std::string(300'000, ' ')},
  };
  for (const auto& [pattern, text] : cases) {
    const std::string error =
        error_of([&, &text = text] { with_pattern(pattern).encode(text, true); });
    const std::string subject = std::string("regular expression of the pre-tokenizer: ") + pattern;
    EXPECT_EQ(error.find(subject + ": "), 0) << error;
  }
}

/// A text in many parts may take no more steps than a text in one part.
TEST(PreTokenizerTest, LimitsTheStepsOfAllPartsTogether) {
  const Tokenizer tokenizer = with_pattern("(?=a*a*b)a|\\S");
  const std::string part = std::string(100, 'a') + "<think>";
  std::string text;
  for (int i = 0; i < 3'000; ++i) text += part;
  EXPECT_EQ(error_of([&] { tokenizer.encode(part, true); }), "no error");
  const std::string error = error_of([&] { tokenizer.encode(text, true); });
  EXPECT_NE(error.find("too many steps"), std::string::npos) << error;
}

/// Each text is 10 MB of what Qwen's pattern takes the most steps for, or matches at most length.
TEST(PreTokenizerTest, TakesLongTextsWithQwensPattern) {
  const PreTokenizer pre_tokenizer(
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}"
      "| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+");
  for (const char* unit : {"  1'", " ", "\n ", "a"}) {
    std::string text;
    while (text.size() < 10'000'000) text += unit;
    const uint64_t limit = PreTokenizer::step_limit(text.size());
    uint64_t steps_left = limit;
    EXPECT_FALSE(pre_tokenizer.split(text, steps_left).empty());
    EXPECT_LT((limit - steps_left) / text.size(), 32) << unit;
  }
}

TEST_F(TokenizerTest, RefusesDamagedFiles) {
  const std::string text = to_text(make_spec());
  for (const std::string& damaged :
       {std::string(), text.substr(0, text.size() / 2), text + "x", std::string("[]"),
        std::string(1 << 20, '['), std::string("{\"version\": \"\xFF\"}"), std::string(64, '\0')}) {
    const std::string error = error_of([&] { load(damaged); });
    EXPECT_NE(error.find("RefusesDamagedFiles.tokenizer.json: "), std::string::npos) << error;
  }
}

TEST(Utf8StreamTest, HoldsBackUnfinishedCharacters) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("a\xF0\x9F"), "a");
  EXPECT_EQ(stream.push("\x98"), "");
  EXPECT_EQ(stream.push("\x80!"), "😀!");
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.push("\xE4\xB8"), "");
  EXPECT_EQ(stream.finish(), "\uFFFD");
  EXPECT_EQ(stream.push("b"), "b");
}

// These are examples of the Unicode standard 15.0, chapter 3.9, tables 3-8 to 3-11. The result is
// the same in whatever way they are cut in two.
TEST(Utf8StreamTest, ReplacesMaximalSubparts) {
  const std::string r = "\uFFFD";
  const std::pair<std::string, std::string> examples[] = {
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", r + r + r + r + "A"},
      {"\xC2", r},
      {std::string("\0\xC2\x80\0", 4), std::string("\0\xC2\x80\0", 4)},
  };
  for (const auto& [bytes, expected] : examples) {
    for (size_t cut = 0; cut <= bytes.size(); ++cut) {
      Utf8Stream stream;
      std::string text = stream.push(bytes.substr(0, cut));
      text += stream.push(bytes.substr(cut));
      EXPECT_EQ(text + stream.finish(), expected);
    }
  }
}

TEST(AlphabetTest, IsReversible) {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(static_cast<char>(byte));
  EXPECT_EQ(alphabet_to_bytes(bytes_to_alphabet(bytes)), bytes);
  EXPECT_EQ(bytes_to_alphabet(" \n\x7F\xA0\xAD\xFF"), "ĠĊġłŃÿ");
  EXPECT_EQ(alphabet_to_bytes("two words"), "two words");  // a space is not in the alphabet
  EXPECT_EQ(alphabet_to_bytes("Ġ漢"), "Ġ漢");
}

}  // namespace
}  // namespace et_moe
