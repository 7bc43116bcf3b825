// Search for many strings at once.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace et_moe {

/// The automaton of Aho and Corasick (Efficient string matching, CACM 18(6), 1975), over patterns
/// that are spelt backwards, so that reading a text from its end tells for every position the
/// longest pattern that begins there. That takes time linear in the text whatever the patterns
/// are, which the usual search for leftmost and longest matches does not: it reads on in vain for
/// a longer match, goes back and reads the same again.
class AhoCorasick {
 public:
  struct Match {
    size_t begin;      // byte of the text
    uint32_t pattern;  // index of the pattern
  };

  /// `patterns` are distinct, none is empty, and their lengths add up to less than 4 GiB. Takes
  /// O(n log p) time for p patterns of n bytes in all, and about 13 bytes of memory per byte.
  explicit AhoCorasick(const std::vector<std::string_view>& patterns);

  /// The matches that do not overlap: the leftmost, of those that begin there the longest, and so
  /// on from its end.
  std::vector<Match> find(std::string_view text) const;

 private:
  static constexpr uint32_t kNone = UINT32_MAX, kRoot = 0;

  uint32_t child(uint32_t node, unsigned char byte) const;
  uint32_t next(uint32_t node, unsigned char byte) const;

  // The nodes of the trie in breadth-first order, the children of each in a row, sorted by byte.
  std::vector<unsigned char> bytes_;   // on the edge that leads to the node
  std::vector<uint32_t> first_child_;  // the last child is the one before the next node's first
  std::vector<uint32_t> suffix_;       // the node of the longest proper suffix that has one
  std::vector<uint32_t> longest_;      // the longest pattern that is a suffix of the node, or kNone
  std::vector<uint32_t> lengths_;      // of the patterns
};

}  // namespace et_moe
