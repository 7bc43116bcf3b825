// The noise and the filters of the op `sample`, see backends/ops/sampling.py: what its CPU kernel
// and whoever else draws a token on the host have in common.
//
// The functions have internal linkage: their users are compiled for different processors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace et_moe::sampling {

// First word of Philox 4x32-10 (Salmon et al., "Parallel Random Numbers", SC 2011): counter words
// (counter, position, 0, 0), the seed's two words as key.
static inline uint32_t philox(uint32_t counter, uint32_t position, uint64_t seed) {
  uint32_t c0 = counter, c1 = position, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

// Standard Gumbel noise made of a random word; it grows with the word.
static inline float to_gumbel(uint32_t word) {
  // The largest number of 24 bits plus 0.5 is rounded to 2^24, whose noise would be infinite.
  const float u = std::min(static_cast<float>(word >> 8) + 0.5f, 0x1p24f - 1.0f) * 0x1p-24f;
  return -std::log(-std::log(u));
}

static inline float gumbel(uint32_t token, uint32_t position, uint64_t seed) {
  return to_gumbel(philox(token, position, seed));
}

// The smallest of n numbers that top-k (0: all) and top-p keep; equal ones stay together. Uses up
// `heap`, which holds the numbers.
static inline float threshold(float* heap, int64_t n, int64_t top_k, float top_p) {
  std::make_heap(heap, heap + n);
  const float largest = heap[0];
  const float* const back = heap + n;
  float* end = heap + n;
  // Moves the heap's largest numbers to behind its end: end..back is sorted, rising.
  const auto pop_equal = [&] {
    const float value = heap[0];
    while (end > heap && heap[0] == value) std::pop_heap(heap, end--);
  };
  if (top_k > 0) {
    while (end > heap && back - end < top_k) pop_equal();
    if (top_p >= 1.0f) return *end;
  }
  const auto weight = [&](float value) { return std::exp(value - largest); };
  double total = 0.0, before = 0.0;
  for (const float* p = top_k > 0 ? end : heap; p < back; ++p) total += weight(*p);
  float kept = largest;
  const float* p = back;
  while (static_cast<float>(before / total) < top_p) {
    if (p == end && top_k == 0) pop_equal();
    if (p == end) break;
    kept = p[-1];
    for (; p > end && p[-1] == kept; --p) before += weight(kept);
  }
  return kept;
}

}  // namespace et_moe::sampling
