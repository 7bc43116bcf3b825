#include "runner/tokenizer/aho_corasick.h"

#include <algorithm>
#include <deque>
#include <numeric>

namespace et_moe {
namespace {

/// The patterns below a node: those from `begin` to `end` in sorted order share `depth` bytes.
struct Range {
  size_t begin, end, depth;
};

/// The byte at `depth` of a pattern that is read from its end.
unsigned char byte_at(std::string_view pattern, size_t depth) {
  return static_cast<unsigned char>(pattern[pattern.size() - 1 - depth]);
}

bool less_from_end(std::string_view a, std::string_view b) {
  return std::lexicographical_compare(a.rbegin(), a.rend(), b.rbegin(), b.rend(),
                                      [](unsigned char x, unsigned char y) { return x < y; });
}

}  // namespace

AhoCorasick::AhoCorasick(const std::vector<std::string_view>& patterns) {
  std::vector<uint32_t> order(patterns.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return less_from_end(patterns[a], patterns[b]); });
  for (const std::string_view pattern : patterns) {
    lengths_.push_back(static_cast<uint32_t>(pattern.size()));
  }

  bytes_ = {0};
  suffix_ = {kRoot};
  std::deque<Range> ranges = {{0, patterns.size(), 0}};  // of the nodes whose children are missing
  for (uint32_t node = 0; !ranges.empty(); ++node, ranges.pop_front()) {
    auto [begin, end, depth] = ranges.front();
    longest_.push_back(node == kRoot ? kNone : longest_[suffix_[node]]);
    if (begin < end && patterns[order[begin]].size() == depth) longest_[node] = order[begin++];
    first_child_.push_back(static_cast<uint32_t>(bytes_.size()));
    while (begin < end) {
      const unsigned char byte = byte_at(patterns[order[begin]], depth);
      const size_t child_begin = begin;
      while (begin < end && byte_at(patterns[order[begin]], depth) == byte) ++begin;
      ranges.push_back({child_begin, begin, depth + 1});
      // The suffix has less depth than the new node, so that its parent has all its children.
      const uint32_t suffix = node == kRoot ? kRoot : next(suffix_[node], byte);
      bytes_.push_back(byte);
      suffix_.push_back(suffix);
    }
  }
  first_child_.push_back(static_cast<uint32_t>(bytes_.size()));
}

/// The child of `node` by `byte`, or kNone.
uint32_t AhoCorasick::child(uint32_t node, unsigned char byte) const {
  const auto begin = bytes_.begin() + first_child_[node];
  const auto end = bytes_.begin() + first_child_[node + 1];
  const auto found = std::lower_bound(begin, end, byte);
  if (found == end || *found != byte) return kNone;
  return static_cast<uint32_t>(found - bytes_.begin());
}

/// The node of the longest suffix of `node` and `byte` that has one.
uint32_t AhoCorasick::next(uint32_t node, unsigned char byte) const {
  for (;; node = suffix_[node]) {
    const uint32_t found = child(node, byte);
    if (found != kNone) return found;
    if (node == kRoot) return kRoot;
  }
}

std::vector<AhoCorasick::Match> AhoCorasick::find(std::string_view text) const {
  std::vector<Match> candidates;  // the longest at each position, from the last position on
  uint32_t node = kRoot;
  for (size_t pos = text.size(); pos-- > 0;) {
    node = next(node, static_cast<unsigned char>(text[pos]));
    if (longest_[node] != kNone) candidates.push_back({pos, longest_[node]});
  }
  std::vector<Match> matches;
  size_t end = 0;
  for (auto match = candidates.rbegin(); match != candidates.rend(); ++match) {
    if (match->begin < end) continue;
    matches.push_back(*match);
    end = match->begin + lengths_[match->pattern];
  }
  return matches;
}

}  // namespace et_moe
