#include "runner/tokenizer/tokenizer.h"

#include <new>
#include <stdexcept>
#include <utility>

#include "runner/errors.h"
#include "runner/tokenizer/normalizer.h"
#include "runner/tokenizer/utf8.h"

namespace et_moe {
namespace {

/// Calls `make`; puts `prefix` in front of the message of what it throws, unless memory ran out.
template <typename Make>
auto with_prefix(const std::string& prefix, const Make& make) {
  try {
    return make();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    throw std::runtime_error(prefix + error.what());
  }
}

void require_utf8(std::string_view text) {
  for (size_t pos = 0; pos < text.size();) {
    const Utf8Sequence sequence = read_utf8(text, pos);
    if (sequence.status != Utf8Status::kValid) {
      throw std::runtime_error("text is not UTF-8 at byte " + std::to_string(pos));
    }
    pos += sequence.length;
  }
}

}  // namespace

Tokenizer Tokenizer::load(const std::string& path) {
  return in_context(path, [&] { return Tokenizer(read_tokenizer_json(path)); });
}

Tokenizer::Tokenizer(TokenizerSpec spec)
    : nfc_(spec.nfc),
      pre_tokenizer_(
          with_prefix(spec.pattern_key + ": ", [&] { return PreTokenizer(spec.pattern); })),
      bpe_(with_prefix("model.", [&] {
        return Bpe(std::move(spec.vocabulary), spec.merges, spec.ignore_merges);
      })) {
  tokens_.resize(bpe_.vocabulary().size());
  for (const auto& [token, id] : bpe_.vocabulary()) tokens_[id].bytes = alphabet_to_bytes(token);
  std::vector<AddedToken> raw, normalized;
  for (AddedToken& token : spec.added_tokens) {
    added_ids_.emplace(token.content, token.id);
    if (token.normalized && nfc_) token.content = normalize_nfc(token.content);
    if (token.id >= vocab_size()) tokens_.resize(token.id + 1);
    tokens_[token.id] = {alphabet_to_bytes(token.content), token.special};
    (token.normalized ? normalized : raw).push_back(std::move(token));
  }
  raw_added_tokens_ = AddedTokenSplitter(std::move(raw));
  normalized_added_tokens_ = AddedTokenSplitter(std::move(normalized));
}

std::vector<int64_t> Tokenizer::encode(std::string_view utf8_text, bool parse_special) const {
  require_utf8(utf8_text);
  std::vector<int64_t> ids;
  uint64_t steps_left = PreTokenizer::step_limit(utf8_text.size());
  const auto encode_plain = [&](std::string_view text) {
    for (const std::string_view piece : pre_tokenizer_.split(text, steps_left)) {
      bpe_.encode(piece, ids);
    }
  };
  // Appends the ids of the added tokens, and calls `encode_text` with what lies between them.
  const auto split = [&](const AddedTokenSplitter& added_tokens, std::string_view text,
                         const auto& encode_text) {
    for (const auto& part : added_tokens.split(text, parse_special)) {
      if (part.token != nullptr) {
        ids.push_back(part.token->id);
      } else {
        encode_text(part.text);
      }
    }
  };
  split(raw_added_tokens_, utf8_text, [&](std::string_view text) {
    const std::string normalized = nfc_ ? normalize_nfc(text) : std::string(text);
    split(normalized_added_tokens_, normalized, encode_plain);
  });
  return ids;
}

const Tokenizer::Token& Tokenizer::token_at(int64_t id) const {
  if (id < 0 || id >= vocab_size()) {
    throw std::runtime_error("token id " + std::to_string(id) + ": expected 0 to " +
                             std::to_string(vocab_size() - 1));
  }
  return tokens_[id];
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  Utf8Stream stream;
  std::string text;
  for (const int64_t id : ids) text += stream.push(id_to_bytes(id));
  return text + stream.finish();
}

std::string_view Tokenizer::id_to_bytes(int64_t id) const { return token_at(id).bytes; }

bool Tokenizer::is_special(int64_t id) const { return token_at(id).special; }

std::optional<int64_t> Tokenizer::token_to_id(std::string_view token) const {
  const std::string name(token);
  if (const auto added = added_ids_.find(name); added != added_ids_.end()) return added->second;
  const auto found = bpe_.vocabulary().find(name);
  if (found == bpe_.vocabulary().end()) return std::nullopt;
  return found->second;
}

}  // namespace et_moe
