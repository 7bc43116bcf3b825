// The tokenizer of Qwen's models, from the tokenizer.json that Hugging Face publishes with them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runner/tokenizer/added_tokens.h"
#include "runner/tokenizer/bpe.h"
#include "runner/tokenizer/pre_tokenizer.h"
#include "runner/tokenizer/tokenizer_json.h"

namespace et_moe {

/// Gives the ids and texts that Hugging Face's tokenizers library (0.23) gives, for files that have
/// Qwen's features and no others:
///   normalizer      NFC or null
///   pre_tokenizer   Split (a Regex that PreTokenizer takes, Isolated, not inverted) and ByteLevel
///                   (no prefix space, no regex); or ByteLevel alone (no prefix space)
///   model           BPE with all 256 bytes in its vocabulary, ids from 0 without gaps, merges as
///                   pairs or strings, ignore_merges or not; no dropout, unknown token, prefix,
///                   suffix or byte fallback
///   decoder         ByteLevel
///   post_processor  ByteLevel, a TemplateProcessing that adds no token, or null
///   added_tokens    as Hugging Face's, but each content once, ids that follow the vocabulary's
///                   without gaps, in any order
/// Components may be wrapped in Sequences. Truncation and padding are not looked at: they are left
/// over from training.
///
/// Exact for every string, whatever characters it has, with a PCRE2 of Unicode 14 (10.42) to 16 and
/// a utf8proc of Unicode 14 (2.7) to 17. A newer PCRE2 would class characters as letters, marks or
/// numbers that are unassigned to Hugging Face's libraries (Unicode 16), as a utf8proc of Unicode
/// 17 does beside an added token with single_word.
///
/// Immutable: may be used by several threads at once. Movable, not copyable.
class Tokenizer {
 public:
  /// Throws std::runtime_error that names the file (once) and the key at fault, whatever the file
  /// holds.
  static Tokenizer load(const std::string& path);

  /// The ids of `utf8_text`. Special tokens written in the text become their ids only with
  /// `parse_special` (Hugging Face's default; without it is its `encode_special_tokens = True`);
  /// other added tokens always do. Throws std::runtime_error if the text is not well-formed UTF-8,
  /// or if the file's regular expression takes too much work on it (see PreTokenizer::step_limit);
  /// the message does not say where the text came from, which only the caller knows.
  std::vector<int64_t> encode(std::string_view utf8_text, bool parse_special) const;

  /// The text of `ids`, special tokens included; ill-formed UTF-8 becomes U+FFFD. Throws
  /// std::runtime_error for an id that is not in 0 to vocab_size() - 1.
  std::string decode(const std::vector<int64_t>& ids) const;

  /// The bytes of one token, for Utf8Stream: maybe only a part of a UTF-8 character. Valid as long
  /// as the tokenizer lives. Throws like `decode`.
  std::string_view id_to_bytes(int64_t id) const;

  /// Whether the id is that of a special added token. Throws like `decode`.
  bool is_special(int64_t id) const;

  /// The greatest id plus one. A model's embedding may have more rows.
  int64_t vocab_size() const { return static_cast<int64_t>(tokens_.size()); }

  /// The id of a token, named as in the file: added tokens as they are, e.g. "<|im_end|>", others
  /// in the byte-level alphabet, e.g. "Ġthe".
  std::optional<int64_t> token_to_id(std::string_view token) const;

 private:
  struct Token {
    std::string bytes;
    bool special = false;
  };

  explicit Tokenizer(TokenizerSpec spec);
  const Token& token_at(int64_t id) const;

  bool nfc_;
  PreTokenizer pre_tokenizer_;
  Bpe bpe_;
  AddedTokenSplitter raw_added_tokens_, normalized_added_tokens_;
  std::unordered_map<std::string, int64_t> added_ids_;
  std::vector<Token> tokens_;  // by id
};

}  // namespace et_moe
