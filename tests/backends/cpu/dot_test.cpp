#include "backends/cpu/dot.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace et_moe::cpu {
namespace {

// The value that the bits of a scale stand for, by the definitions of the formats.
double value_of(uint16_t bits, ScaleType type) {
  const int mantissa_bits = type == ScaleType::kFloat16 ? 10 : 7;
  const int bias = type == ScaleType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7FFF) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int one = exponent > 0 ? 1 << mantissa_bits : 0;
  const double value = std::ldexp(one + mantissa, std::max(exponent, 1) - bias - mantissa_bits);
  return bits & 0x8000 ? -value : value;
}

uint16_t to_bf16(float value) {
  uint32_t raw;
  std::memcpy(&raw, &value, sizeof(raw));
  return static_cast<uint16_t>(raw >> 16);
}

template <class Rows>
std::vector<float> run_dot(DotFunction<Rows> function, const Rows& weights, int64_t rows,
                           const std::vector<std::vector<Int8Chunk>>& x) {
  std::vector<const Int8Chunk*> rows_of_x;
  for (const auto& row : x) rows_of_x.push_back(row.data());
  std::vector<float> out(x.size() * rows, NAN);
  function(weights, rows, rows_of_x.data(), x.size(), out.data(), rows);
  return out;
}

// Random INT4 weights and activations, each in memory of exactly its size.
struct Problem {
  int64_t rows, columns, group_size, tokens;
  ScaleType type;
  std::vector<uint8_t> packed;
  std::vector<uint16_t> scale;
  std::vector<std::vector<Int8Chunk>> x;
  std::vector<std::vector<int8_t>> q;  // the values of x, in the order of the columns

  Problem(int64_t rows, int64_t columns, int64_t group_size, int64_t tokens, bool extreme,
          ScaleType type)
      : rows(rows),
        columns(columns),
        group_size(group_size),
        tokens(tokens),
        type(type),
        packed(rows * columns / 2),
        scale(rows * columns / group_size) {
    std::mt19937 random(rows + columns + group_size + tokens);
    std::normal_distribution<float> normal;
    for (auto& byte : packed) byte = extreme ? 0xFF : random();
    // Scales in fp16 are below 2, with subnormal and negative ones among them; in bf16 they are of
    // about 1 in magnitude.
    const bool half = type == ScaleType::kFloat16;
    for (auto& s : scale)
      s = half ? random() % 0x4000 | random() % 2 << 15 : to_bf16(normal(random));
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<Int8Chunk> row((columns + kChunk - 1) / kChunk);
      std::memset(row.data(), 0, row.size() * sizeof(Int8Chunk));
      q.emplace_back();
      for (int64_t k = 0; k < columns; ++k) {
        const auto value = static_cast<int8_t>(extreme ? (k % 7 ? -128 : 127)
                                                       : static_cast<int>(random() % 255) - 127);
        Int8Chunk& chunk = row[k / kChunk];
        int8_t* half = k % 2 ? chunk.second : chunk.first;
        half[k % kChunk / 2] = value;
        chunk.bias[k % kChunk / 8] -= 8 * value;
        if (k % 8 == 0) chunk.scale[k % kChunk / 8] = std::abs(normal(random));
        q.back().push_back(value);
      }
      x.push_back(row);
    }
  }

  std::vector<float> run(const DotFunctions& functions) const {
    const Int4Rows weights{packed.data(), scale.data(), columns, group_size, type};
    return run_dot(functions.int4, weights, rows, x);
  }

  double expected(int64_t token, int64_t row) const {
    double total = 0.0;
    for (int64_t k = 0; k < columns; ++k) {
      const uint8_t byte = packed[(row * columns + k) / 2];
      total += value_of(scale[(row * columns + k) / group_size], type) *
               x[token][k / kChunk].scale[k % kChunk / 8] * q[token][k] *
               ((k % 2 ? byte >> 4 : byte & 0xF) - 8);
    }
    return total;
  }
};

std::vector<Problem> problems() {
  std::vector<Problem> all;
  for (ScaleType type : {ScaleType::kBFloat16, ScaleType::kFloat16}) {
    for (int64_t group : {32, 64, 128}) {
      for (int64_t groups : {1, 2, 3, 4, 5, 7, 16}) {
        for (int64_t rows : {1, 4, 7}) {
          for (int64_t tokens : {1, 2, 3, 4, 6, 9}) {
            all.emplace_back(rows, group * groups, group, tokens, false, type);
          }
        }
      }
      all.emplace_back(9, group * 8, group, 5, true, type);
    }
  }
  return all;
}

// The same with INT8 weights.
struct Int8Problem {
  int64_t rows, columns, tokens;
  std::vector<int8_t> values;
  std::vector<uint16_t> scale;
  std::vector<std::vector<Int8Chunk>> x;
  std::vector<std::vector<int8_t>> q;

  Int8Problem(int64_t rows, int64_t columns, int64_t tokens, bool extreme)
      : rows(rows), columns(columns), tokens(tokens), values(rows * columns), scale(rows) {
    std::mt19937 random(rows + columns + tokens);
    std::normal_distribution<float> normal(0.0f, 0.01f);
    for (auto& value : values) value = extreme ? -128 : static_cast<int8_t>(random());
    for (auto& s : scale) s = to_bf16(std::abs(normal(random)));
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<Int8Chunk> row((columns + kChunk - 1) / kChunk);
      std::memset(row.data(), 0, row.size() * sizeof(Int8Chunk));
      for (Int8Chunk& chunk : row) {
        for (int run = 0; run < 4; ++run) {
          std::fill_n(chunk.scale + 4 * run, 4, std::abs(normal(random)));
        }
      }
      q.emplace_back();
      for (int64_t k = 0; k < columns; ++k) {
        const int any = static_cast<int>(random() % 255) - 127;
        const auto value = static_cast<int8_t>(extreme ? (k / 128 % 2 ? -127 : 127) : any);
        Int8Chunk& chunk = row[k / kChunk];
        const int64_t at = k % kChunk / 32 * 16 + k % 16;
        (k % 32 < 16 ? chunk.first : chunk.second)[at] = value;
        chunk.bias[at / 4] -= 128 * value;
        q.back().push_back(value);
      }
      x.push_back(row);
    }
  }

  std::vector<float> run(const DotFunctions& functions) const {
    return run_dot(functions.int8, {values.data(), scale.data(), columns}, rows, x);
  }

  double expected(int64_t token, int64_t row) const {
    double total = 0.0;
    for (int64_t k = 0; k < columns; ++k) {
      total += x[token][k / kChunk].scale[k % kChunk / 8] * q[token][k] * values[row * columns + k];
    }
    return total * value_of(scale[row], ScaleType::kBFloat16);
  }
};

std::vector<Int8Problem> int8_problems() {
  std::vector<Int8Problem> all;
  for (int64_t columns : {1, 40, 63, 65, 128, 200, 384, 511}) {
    for (int64_t rows : {1, 4, 7}) {
      for (int64_t tokens : {1, 2, 3, 4, 6, 9}) all.emplace_back(rows, columns, tokens, false);
    }
    all.emplace_back(9, columns, 5, true);
  }
  return all;
}

template <class Problems>
void expect_definition(const Problems& problems) {
  for (const auto& problem : problems) {
    const auto out = problem.run(dot_scalar);
    for (int64_t t = 0; t < problem.tokens; ++t) {
      for (int64_t r = 0; r < problem.rows; ++r) {
        const double want = problem.expected(t, r);
        EXPECT_NEAR(out[t * problem.rows + r], want, 1e-5 * std::abs(want) + 1e-2)
            << problem.columns << " columns, " << problem.rows << " rows";
      }
    }
  }
}

TEST(Dot, ScalarEqualsTheDefinition) { expect_definition(problems()); }
TEST(Dot, ScalarEqualsTheDefinitionOfInt8) { expect_definition(int8_problems()); }

class DotVariantTest : public testing::TestWithParam<int> {
 protected:
  template <class Problems>
  void expect_scalar_bits(const Problems& problems) {
    const DotVariant& variant = dot_variants()[GetParam()];
    if (!variant.supported) GTEST_SKIP() << "this processor lacks " << variant.name;
    for (const auto& problem : problems) {
      const auto want = problem.run(dot_scalar), got = problem.run(variant.functions);
      ASSERT_EQ(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)), 0)
          << problem.rows << " x " << problem.columns << ", " << problem.tokens << " tokens";
    }
  }
};

// The bits must be equal, not only the values: what a model says must not depend on the processor.
TEST_P(DotVariantTest, EqualsScalarBitForBit) { expect_scalar_bits(problems()); }
TEST_P(DotVariantTest, EqualsScalarBitForBitOnInt8) { expect_scalar_bits(int8_problems()); }

INSTANTIATE_TEST_SUITE_P(All, DotVariantTest, testing::Range(0, kDotVariants),
                         [](const auto& info) { return dot_variants()[info.param].name; });

TEST(Dot, DispatchTakesTheBestSupportedVariant) {
  const DotVariant* variants = dot_variants();
  EXPECT_STREQ(variants[kDotVariants - 1].name, "scalar");
  for (int i = 0; i < kDotVariants; ++i) {
    if (variants[i].supported) {
      EXPECT_EQ(best_dot().int4, variants[i].functions.int4);
      EXPECT_EQ(best_dot().int8, variants[i].functions.int8);
      break;
    }
  }
}

}  // namespace
}  // namespace et_moe::cpu
