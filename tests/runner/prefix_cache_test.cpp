// Tests of the prefix cache and of the pool of pages, without a device.
#include "runner/prefix_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace et_moe {
namespace {

constexpr size_t kPage = 4;
using Ids = std::vector<int64_t>;

/// Stands for a model: feeds sequences and leaves their pages to the cache.
class Served {
 public:
  Served(int32_t pages, int32_t snapshots) : pool(pages, 1, snapshots), cache(pool, kPage) {}

  /// Pages for so many tokens, which a sequence that begins holds.
  std::vector<int32_t> take(size_t tokens) {
    const size_t count = (tokens + kPage - 1) / kPage;
    cache.make_room(count);
    std::vector<int32_t> pages;
    while (pages.size() < count) pages.push_back(pool.pages.take());
    return pages;
  }

  /// A sequence is fed these tokens, leaves a snapshot behind the last full page, and ends.
  std::optional<int32_t> serve(const Ids& tokens, bool passing = false) {
    const std::vector<int32_t> pages = take(tokens.size());
    const Ids full(tokens.begin(),
                   tokens.begin() + static_cast<std::ptrdiff_t>(tokens.size() / kPage * kPage));
    const auto slot = cache.add(full, pages, passing);
    for (const int32_t page : pages) pool.pages.give(page);
    return slot;
  }

  StatePool pool;
  PrefixCache cache;
};

TEST(PrefixCache, FindsTheLongestPrefixWithASnapshot) {
  Served served(20, 4);
  EXPECT_FALSE(served.cache.find({1, 2, 3, 4, 5}, 5).slot);
  const auto slot = served.serve({1, 2, 3, 4, 5, 6, 7, 8, 9});
  ASSERT_TRUE(slot);
  EXPECT_GE(*slot, 1) << "slot 0 is a sequence's";
  const auto match = served.cache.find({1, 2, 3, 4, 5, 6, 7, 8, 1, 1}, 9);
  EXPECT_EQ(match.slot, slot);
  EXPECT_EQ(match.pages.size(), 2u);
  EXPECT_EQ(match.known, 8u);
  // The snapshot is behind the second page, and the second page is another one here.
  const auto fork = served.cache.find({1, 2, 3, 4, 9, 9, 9, 9}, 8);
  EXPECT_FALSE(fork.slot);
  EXPECT_EQ(fork.known, 4u);
  // The limit leaves a token to be fed.
  EXPECT_EQ(served.cache.find({1, 2, 3, 4, 5, 6, 7, 8}, 7).known, 4u);
}

TEST(PrefixCache, ASnapshotTakesThePlaceOfTheOneAPageBefore) {
  Served served(20, 2);
  const Ids first{1, 2, 3, 4}, second{1, 2, 3, 4, 5, 6, 7, 8};
  ASSERT_TRUE(served.serve(first, true));
  ASSERT_TRUE(served.serve(second, true));
  EXPECT_EQ(served.pool.snapshots.size(), 1u);
  EXPECT_FALSE(served.cache.find(first, 4).slot);
  // One that somebody went on from stays.
  ASSERT_TRUE(served.cache.find(second, 8).slot);
  Ids third(second);
  third.insert(third.end(), {9, 9, 9, 9});
  ASSERT_TRUE(served.serve(third, true));
  EXPECT_EQ(served.cache.find(second, 8).pages.size(), 2u);
  EXPECT_FALSE(served.serve(third, true)) << "there is one already";
}

TEST(PrefixCache, WhatWasUsedLongestAgoGoesFirst) {
  Served served(3, 3);
  const Ids a{1, 1, 1, 1}, b{2, 2, 2, 2}, c{3, 3, 3, 3}, d{4, 4, 4, 4};
  for (const Ids& ids : {a, b, c}) ASSERT_TRUE(served.serve(ids));
  EXPECT_EQ(served.pool.pages.size(), 0u);
  EXPECT_EQ(served.pool.pages.idle(), 3u);
  EXPECT_TRUE(served.cache.find(a, 4).slot);
  ASSERT_TRUE(served.serve(d));
  EXPECT_FALSE(served.cache.find(b, 4).slot);
  for (const Ids& ids : {a, c, d}) EXPECT_TRUE(served.cache.find(ids, 4).slot);
}

TEST(PrefixCache, FewerSnapshotsThanPages) {
  Served served(10, 1);
  ASSERT_TRUE(served.serve({1, 1, 1, 1}));
  ASSERT_TRUE(served.serve({2, 2, 2, 2}));
  const auto match = served.cache.find({1, 1, 1, 1}, 4);
  EXPECT_FALSE(match.slot);
  EXPECT_EQ(match.known, 4u) << "its page is still known";
  Served none(10, 0);
  EXPECT_FALSE(none.serve({1, 1, 1, 1}));
}

TEST(PrefixCache, PagesThatASequenceHoldsAreNotGivenToAnother) {
  Served served(2, 2);
  ASSERT_TRUE(served.serve({1, 1, 1, 1}));
  const auto match = served.cache.find({1, 1, 1, 1, 2}, 4);
  served.pool.pages.hold(match.pages[0]);
  EXPECT_EQ(served.pool.pages.idle(), 0u);
  served.cache.make_room(2);
  EXPECT_EQ(served.pool.pages.size(), 1u) << "the cache forgets it, the sequence keeps it";
  served.pool.pages.give(match.pages[0]);
  EXPECT_EQ(served.pool.pages.size(), 2u);
}

TEST(PrefixCache, ThereIsOneCopyOfAPage) {
  Served served(4, 2);
  served.serve({1, 1, 1, 1, 2});
  const std::vector<int32_t> pages = served.take(8);
  served.cache.add({1, 1, 1, 1, 2, 2, 2, 2}, pages, false);
  EXPECT_EQ(served.pool.pages.size(), 2u) << "the page of the first sequence is free";
  EXPECT_EQ(served.cache.find({1, 1, 1, 1, 2, 2, 2, 2}, 8).pages, pages);
  for (const int32_t page : pages) served.pool.pages.give(page);
  EXPECT_EQ(served.pool.pages.idle(), 2u);
}

TEST(PrefixCache, CountsItselfAfterManySequences) {
  Served served(30, 5);
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    Ids tokens(random() % 40);
    for (int64_t& token : tokens) token = static_cast<int64_t>(random() % 2);
    const auto match = served.cache.find(tokens, tokens.empty() ? 0 : tokens.size() - 1);
    EXPECT_EQ(match.slot.has_value(), !match.pages.empty());
    served.serve(tokens, random() % 2);
    ASSERT_EQ(served.pool.pages.size() + served.pool.pages.idle(), 30u);
  }
  served.cache.make_room(30);
  EXPECT_EQ(served.pool.pages.size(), 30u);
  EXPECT_EQ(served.pool.snapshots.size(), 5u);
}

}  // namespace
}  // namespace et_moe
