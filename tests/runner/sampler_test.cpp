// Compares the host's drawing of tokens with the op `sample` of the CPU's kernels.
#include "runner/sampler.h"

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace et_moe {
namespace {

using executorch::extension::from_blob;
using executorch::extension::make_tensor_ptr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

/// The token that the op draws.
int64_t draw_by_op(std::vector<float> logits, const Sampling& s, int64_t position) {
  executorch::runtime::runtime_init();
  const auto size = static_cast<int>(logits.size());
  int64_t token = -1;
  const auto row = from_blob(logits.data(), {1, size});
  const auto temperature = make_tensor_ptr(std::vector<float>{s.temperature});
  const auto top_k = make_tensor_ptr(std::vector<int64_t>{s.top_k});
  const auto top_p = make_tensor_ptr(std::vector<float>{s.top_p});
  const auto seed = make_tensor_ptr(std::vector<int64_t>{s.seed});
  const auto at = make_tensor_ptr(std::vector<int64_t>{position});
  const auto out = from_blob(&token, {1, 1}, executorch::aten::ScalarType::Long);
  std::vector<EValue> values{EValue(*row),  EValue(*temperature), EValue(*top_k), EValue(*top_p),
                             EValue(*seed), EValue(*at),          EValue(*out),   EValue(*out)};
  std::vector<EValue*> stack;
  for (EValue& value : values) stack.push_back(&value);
  executorch::extension::MallocMemoryAllocator allocator;
  executorch::runtime::KernelRuntimeContext context(nullptr, &allocator);
  const auto op = executorch::runtime::get_op_function_from_registry("et_moe::sample.out");
  EXPECT_TRUE(op.ok());
  (*op)(context, {stack.data(), stack.size()});
  EXPECT_EQ(context.failure_state(), Error::Ok);
  return token;
}

int64_t draw_by_host(const std::vector<float>& logits, const Sampling& sampling, int64_t position) {
  SamplingParams params;
  params.sampling = sampling;
  return Sampler(params, static_cast<int64_t>(logits.size()), {})
      .draw(logits.data(), position, nullptr);
}

TEST(Sampler, DrawsWhatTheOpDraws) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  for (int round = 0; round < 300; ++round) {
    std::vector<float> logits(round % 3 ? 50 : 5000);
    for (float& logit : logits) logit = normal(random);
    // Some logits are equal, and some tokens cannot be drawn.
    for (size_t i = 0; i < logits.size() / 4; ++i) logits[random() % logits.size()] = logits[0];
    for (size_t i = 0; i < logits.size() / 4; ++i) {
      logits[random() % logits.size()] = -std::numeric_limits<float>::infinity();
    }
    Sampling s;
    s.temperature = round % 10 ? 0.25f + static_cast<float>(random() % 16) / 4 : 0;
    s.top_k = random() % 2 ? 0 : 1 + random() % 60;
    s.top_p = random() % 2 ? 1 : 0.05f + static_cast<float>(random() % 90) / 100;
    s.seed = static_cast<int64_t>(random()) * static_cast<int64_t>(random()) - 5;
    const int64_t position = random() % 5000;
    ASSERT_EQ(draw_by_host(logits, s, position), draw_by_op(logits, s, position)) << round;
  }
}

TEST(Sampler, AMaskLeavesOnlyItsTokens) {
  const std::vector<float> logits{5, 4, 3, 2, 1, 0, -1, -2, -3};
  for (const float temperature : {0.0f, 2.0f}) {
    SamplingParams params;
    params.sampling.temperature = temperature;
    Sampler sampler(params, 9, {});
    for (int64_t position = 0; position < 50; ++position) {
      const TokenMask mask{0b01001000, 0b1};
      const int64_t token = sampler.draw(logits.data(), position, &mask);
      EXPECT_TRUE(token == 3 || token == 6 || token == 8) << token;
      if (temperature == 0) {
        EXPECT_EQ(token, 3);
      }
    }
    const TokenMask none(2, 0);
    EXPECT_THROW(sampler.draw(logits.data(), 0, &none), std::runtime_error);
  }
}

TEST(Sampler, PenaltiesInVllmsOrder) {
  SamplingParams params;
  params.repetition_penalty = 2;
  params.presence_penalty = 1;
  params.frequency_penalty = 0.5f;
  params.logit_bias = {{0, 8.0f}};
  // Token 0, which the prompt has, begins at (2 + 8) / 2 = 5, and token 1 at 4.
  Sampler sampler(params, 3, {0});
  const std::vector<float> logits{2, 4, -3};
  EXPECT_EQ(sampler.draw(logits.data(), 0, nullptr), 0);
  sampler.add(0);  // 5 - 0.5 - 1 = 3.5
  EXPECT_EQ(sampler.draw(logits.data(), 0, nullptr), 1);
  sampler.add(1);  // 4 / 2 - 1.5 = 0.5
  EXPECT_EQ(sampler.draw(logits.data(), 0, nullptr), 0);
  for (int i = 0; i < 6; ++i) sampler.add(0);  // 5 - 3.5 - 1 = 0.5, as token 1
  EXPECT_EQ(sampler.draw(logits.data(), 0, nullptr), 0);
  sampler.add(0);
  EXPECT_EQ(sampler.draw(logits.data(), 0, nullptr), 1);
}

TEST(Sampler, TheLikeliestTokensComeInOrder) {
  const float logits[] = {1, 3, 3, 2};
  const TokenLogprob found = token_logprob(logits, 4, 3, 3);
  const double total = std::log(std::exp(1.0) + 2 * std::exp(3.0) + std::exp(2.0));
  EXPECT_NEAR(found.logprob, 2 - total, 1e-12);
  ASSERT_EQ(found.top.size(), 3u);
  EXPECT_EQ(found.top[0].first, 1);
  EXPECT_EQ(found.top[1].first, 2);
  EXPECT_EQ(found.top[2].first, 3);
  EXPECT_NEAR(found.top[0].second, 3 - total, 1e-12);
}

}  // namespace
}  // namespace et_moe
