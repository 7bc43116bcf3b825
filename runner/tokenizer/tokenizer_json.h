// Reading of tokenizer.json, the file format of Hugging Face's tokenizers library.
#pragma once

#include <string>
#include <vector>

#include "runner/tokenizer/added_tokens.h"
#include "runner/tokenizer/bpe.h"

namespace et_moe {

/// What a tokenizer.json of Qwen's kind says. Ids are complete and unique: the vocabulary has
/// 0 to V-1; an added token has the id of the vocabulary's token of that name or else one from V
/// on, and these have no gaps either.
struct TokenizerSpec {
  bool nfc = false;         // normalizer: NFC or none
  std::string pattern;      // of the pre-tokenizer; not checked here
  std::string pattern_key;  // where it stands in the file
  Bpe::Vocabulary vocabulary;
  Bpe::Merges merges;  // not checked against the vocabulary here
  bool ignore_merges = false;
  std::vector<AddedToken> added_tokens;  // contents are unique and not empty; in any order
};

/// Reads and checks the file. Throws an exception that names the key (not the file) for a file that
/// cannot be read, is no JSON or of more than 64 MiB, or that has a feature or value that is not
/// supported (see tokenizer.h): unknown keys are refused too.
TokenizerSpec read_tokenizer_json(const std::string& path);

}  // namespace et_moe
