#include "runner/prefix_cache.h"

#include <algorithm>
#include <utility>

namespace et_moe {

PrefixCache::PrefixCache(StatePool& pool, size_t page_size) : pool_(pool), page_size_(page_size) {}

PrefixCache::Block PrefixCache::block_of(const std::vector<int64_t>& tokens, size_t index) const {
  const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(index * page_size_);
  return Block(first, first + static_cast<std::ptrdiff_t>(page_size_));
}

void PrefixCache::touch(Node& node) {
  const std::pair before{node.used, &node};
  node.used = ++clock_;
  if (leaves_.erase(before)) leaves_.emplace(node.used, &node);
  if (snapshots_.erase(before)) snapshots_.emplace(node.used, &node);
}

PrefixCache::Match PrefixCache::find(const std::vector<int64_t>& tokens, size_t limit) {
  Match match;
  std::vector<int32_t> pages;
  Node *node = &root_, *found = nullptr;
  for (size_t i = 0; (i + 1) * page_size_ <= std::min(limit, tokens.size()); ++i) {
    const auto child = node->children.find(block_of(tokens, i));
    if (child == node->children.end()) break;
    node = child->second.get();
    touch(*node);
    pages.push_back(node->page);
    match.known += page_size_;
    if (node->slot) {
      found = node;
      match.slot = node->slot;
      match.pages = pages;
    }
  }
  if (found) found->passing = false;
  return match;
}

void PrefixCache::keep(Node& node, int32_t page) {
  pool_.pages.hold(page);
  if (node.page >= 0) {
    pool_.pages.set_cached(node.page, false);
    pool_.pages.give(node.page);
  }
  node.page = page;
  pool_.pages.set_cached(page, true);
}

PrefixCache::Node& PrefixCache::add_child(Node& parent, Block block) {
  const auto child = parent.children.emplace(std::move(block), std::make_unique<Node>()).first;
  Node& node = *child->second;
  node.parent = &parent;
  node.block = &child->first;
  leaves_.erase({parent.used, &parent});
  leaves_.emplace(node.used, &node);
  return node;
}

std::optional<int32_t> PrefixCache::add(const std::vector<int64_t>& tokens,
                                        const std::vector<int32_t>& pages, bool passing) {
  Node* node = &root_;
  for (size_t i = 0; i < tokens.size() / page_size_; ++i) {
    Block block = block_of(tokens, i);
    const auto child = node->children.find(block);
    node =
        child == node->children.end() ? &add_child(*node, std::move(block)) : child->second.get();
    // In place of the page that another sequence left for the same tokens: there is one copy.
    if (node->page != pages[i]) keep(*node, pages[i]);
    touch(*node);
  }
  if (node == &root_ || node->slot || tokens.size() % page_size_ != 0) return std::nullopt;
  Node& before = *node->parent;
  if (passing && before.passing && before.slot) drop_snapshot(before);
  if (pool_.snapshots.size() == 0) {
    if (snapshots_.empty()) return std::nullopt;
    drop_snapshot(*snapshots_.begin()->second);
  }
  node->passing = passing;
  node->slot = pool_.snapshots.take();
  snapshots_.emplace(node->used, node);
  return node->slot;
}

void PrefixCache::drop_snapshot(Node& node) {
  snapshots_.erase({node.used, &node});
  pool_.snapshots.give(*node.slot);
  node.slot.reset();
}

void PrefixCache::drop(Node& node) {
  if (node.slot) drop_snapshot(node);
  leaves_.erase({node.used, &node});
  pool_.pages.set_cached(node.page, false);
  pool_.pages.give(node.page);
  Node& parent = *node.parent;
  parent.children.erase(parent.children.find(*node.block));
  if (&parent != &root_ && parent.children.empty()) leaves_.emplace(parent.used, &parent);
}

void PrefixCache::make_room(size_t count) {
  while (pool_.pages.size() < count && !leaves_.empty()) drop(*leaves_.begin()->second);
}

}  // namespace et_moe
