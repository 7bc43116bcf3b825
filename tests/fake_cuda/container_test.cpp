// Who owns the tensors that a method's code is given and gives, also where it fails.
#include "backends/cuda/runtime/container.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

namespace et_moe::cuda {
namespace {

class ContainerTest : public testing::Test {
 protected:
  /// As many inputs; `memory_` says which of them live.
  std::vector<std::unique_ptr<Tensor>> inputs(size_t count) {
    std::vector<std::unique_ptr<Tensor>> tensors;
    for (size_t i = 0; i < count; ++i) {
      const Arena::Block block(new std::byte[1], [](std::byte* p) { delete[] p; });
      tensors.push_back(view(block.get(), {1}, 0));
      tensors.back()->owner = block;
      memory_.push_back(block);
    }
    return tensors;
  }

  size_t live() const {
    size_t count = 0;
    for (const auto& block : memory_) count += !block.expired();
    return count;
  }

  /// What a run says that fails.
  std::string failure(size_t input_count, size_t output_count) {
    try {
      container_.run(inputs(input_count), output_count, nullptr);
    } catch (const DelegateError& e) {
      return e.what();
    }
    return "";
  }

  static std::string read_code() {
    std::ifstream file(ET_MOE_CONTAINER_CODE, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  std::string code_ = read_code();
  Kernels kernels_;
  Container container_{code_.data(), code_.size(), "decode", kernels_};
  std::vector<std::weak_ptr<std::byte>> memory_;
};

TEST_F(ContainerTest, OutputsAreTheCallers) {
  auto outputs = container_.run(inputs(2), 2, nullptr);
  EXPECT_EQ(outputs.size(), 2u);
  EXPECT_EQ(live(), 2u);
  outputs.clear();
  EXPECT_EQ(live(), 0u);
}

TEST_F(ContainerTest, InputsThatTheCodeDoesNotTakeOverGo) {
  const auto outputs = container_.run(inputs(2), 1, nullptr);
  EXPECT_EQ(live(), 1u);
}

TEST_F(ContainerTest, NothingIsLeftOfARunThatFails) {
  EXPECT_EQ(failure(3, 2), "the code decode failed: out of luck");
  EXPECT_EQ(live(), 0u);
}

TEST_F(ContainerTest, NothingIsLeftOfARunThatThrows) {
  EXPECT_EQ(failure(4, 2), "the code decode failed: expected 3 inputs");
  EXPECT_EQ(live(), 0u);
}

TEST_F(ContainerTest, NothingIsLeftOfOutputsThatAreTooFew) {
  EXPECT_EQ(failure(1, 2), "the code decode returns fewer than its outputs: out of luck");
  EXPECT_EQ(live(), 0u);
}

}  // namespace
}  // namespace et_moe::cuda
