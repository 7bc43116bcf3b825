// What sequences that have been served leave behind: full pages of the KV cache and snapshots of
// recurrent state, found again by the tokens that made them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "runner/state_pool.h"

namespace et_moe {

/// A tree over token ids, a node a full page: the path to it is the tokens before. A node may have
/// a snapshot of the recurrent state behind its last token, in a slot of its own; only from there
/// can a sequence go on. What was used longest ago is dropped first (Zheng et al., "SGLang", 2024,
/// have such a tree without recurrent state).
class PrefixCache {
 public:
  /// Holds pages, and snapshots in the slots of `pool.snapshots`. The pool must outlive it.
  PrefixCache(StatePool& pool, size_t page_size);
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  /// The longest known prefix of some tokens.
  struct Match {
    std::vector<int32_t> pages;   // up to the snapshot
    std::optional<int32_t> slot;  // of the snapshot; none if nothing can be used
    size_t known = 0;             // tokens in full pages that are known, with or without a snapshot
  };
  /// Finds it among the first `limit` tokens, and counts it as used. Who goes on from it holds its
  /// pages, too, before anything else is asked of the cache, and copies the snapshot.
  Match find(const std::vector<int64_t>& tokens, size_t limit);

  /// Keeps the full pages of a sequence that has been fed these tokens. Returns the slot for a
  /// snapshot behind the last of them; none if they do not fill pages, if there is a snapshot, or
  /// no slot for one.
  ///
  /// `passing`: the sequence goes on. This snapshot takes the place of the one that it left a page
  /// before, unless somebody else has used that.
  std::optional<int32_t> add(const std::vector<int64_t>& tokens, const std::vector<int32_t>& pages,
                             bool passing);

  /// Drops what was used longest ago until `count` pages are free, or nothing is left.
  void make_room(size_t count);

 private:
  using Block = std::vector<int64_t>;
  struct Node {
    Node* parent = nullptr;
    std::map<Block, std::unique_ptr<Node>> children;
    const Block* block = nullptr;  // its key in its parent's children
    int32_t page = -1;
    std::optional<int32_t> slot;
    bool passing = false;  // see `add`
    uint64_t used = 0;
  };
  using Order = std::set<std::pair<uint64_t, Node*>>;

  void touch(Node& node);
  Node& add_child(Node& parent, Block block);
  /// Makes a page that of a node, instead of the one that it has.
  void keep(Node& node, int32_t page);
  void drop_snapshot(Node& node);
  /// Drops a node without children.
  void drop(Node& node);
  Block block_of(const std::vector<int64_t>& tokens, size_t index) const;

  StatePool& pool_;
  const size_t page_size_;
  Node root_;
  uint64_t clock_ = 0;
  Order leaves_, snapshots_;  // by their last use
};

}  // namespace et_moe
