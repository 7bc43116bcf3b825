// Byte-level byte pair encoding (BPE: Sennrich et al. 2016, arXiv:1508.07909; byte-level: GPT-2).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace et_moe {

/// GPT-2's reversible alphabet, in which vocabularies are written: one printable character per
/// byte, e.g. "Ġ" for a space.
std::string bytes_to_alphabet(std::string_view bytes);

/// The bytes of a token. A token with a character from outside the alphabet (an added token may
/// have one) stands for its own UTF-8 bytes, as in Hugging Face's ByteLevel decoder.
std::string alphabet_to_bytes(std::string_view token);

/// Hugging Face's `models.BPE` of a byte-level vocabulary, without dropout and unknown token.
class Bpe {
 public:
  using Vocabulary = std::unordered_map<std::string, int32_t>;  // token in the alphabet -> id
  using Merges = std::vector<std::pair<std::string, std::string>>;

  /// `merges` come in order of priority. With `ignore_merges` a piece that is a token as a whole
  /// becomes that token, whether merges lead to it or not. Throws std::runtime_error if the
  /// vocabulary lacks one of the 256 bytes, a part of a merge or its result.
  Bpe(Vocabulary vocabulary, const Merges& merges, bool ignore_merges);

  /// Appends the ids of one piece of text; O(n log n) for n bytes.
  void encode(std::string_view piece, std::vector<int64_t>& ids) const;

  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  struct Merge {
    uint32_t rank;
    int32_t id;  // of the merged token
  };
  struct Symbol;
  struct Candidate;

  const Merge* find_merge(int32_t left, int32_t right) const;
  void merge_all(std::vector<Symbol>& symbols) const;

  Vocabulary vocabulary_;
  std::array<int32_t, 256> byte_ids_;
  std::unordered_map<uint64_t, Merge> merges_;  // left id << 32 | right id
  bool ignore_merges_;
};

}  // namespace et_moe
