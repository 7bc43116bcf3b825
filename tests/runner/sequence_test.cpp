// Tests of the pieces in which a prompt is fed, without a model.
#include "runner/sequence.h"

#include <gtest/gtest.h>

namespace et_moe {
namespace {

/// The ends of the pieces from `begin` to `end`.
std::vector<size_t> pieces(size_t begin, size_t end, size_t bound) {
  std::vector<size_t> ends;
  while (begin < end) ends.push_back(begin = bounded_end(begin, end, bound));
  return ends;
}

TEST(BoundedEnd, LeavesPiecesThatAreShortEnough) {
  EXPECT_EQ(pieces(0, 1024, 1024), std::vector<size_t>{1024});
  EXPECT_EQ(pieces(7, 1031, 1024), std::vector<size_t>{1031});
  EXPECT_EQ(pieces(0, 4096, SIZE_MAX), std::vector<size_t>{4096});
}

TEST(BoundedEnd, CutsAtMultiples) {
  EXPECT_EQ(pieces(0, 2048, 1024), (std::vector<size_t>{1024, 2048}));
  EXPECT_EQ(pieces(320, 2048, 1024), (std::vector<size_t>{1024, 2048}));
  EXPECT_EQ(pieces(4096, 8000, 1024), (std::vector<size_t>{5120, 6144, 7168, 8000}));
}

TEST(BoundedEnd, LeavesNoShortPieces) {
  EXPECT_EQ(pieces(0, 1280, 1024), std::vector<size_t>{1280});
  EXPECT_EQ(pieces(0, 1281, 1024), (std::vector<size_t>{1024, 1281}));
  EXPECT_EQ(pieces(768, 2048, 1024), std::vector<size_t>{2048});
  EXPECT_EQ(pieces(767, 2048, 1024), (std::vector<size_t>{1024, 2048}));
  EXPECT_EQ(pieces(1000, 3072, 1024), (std::vector<size_t>{2048, 3072}));
}

}  // namespace
}  // namespace et_moe
