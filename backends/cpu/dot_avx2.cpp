// Compiled for AVX2 and FMA.
#include "backends/cpu/dot_256.h"

namespace et_moe::cpu {
namespace {

struct Maddubs {
  // Pairs of products fit int16 (at most 15 * 128 * 2), and so do the two sums' sums.
  static __m256i add(__m256i bias, __m256i low, __m256i even, __m256i high, __m256i odd) {
    const __m256i pairs =
        _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
    return _mm256_add_epi32(bias, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

void dot_avx2(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
              float* out, int64_t stride) {
  dot<Isa256<Maddubs>>(weights, rows, x, tokens, out, stride);
}

}  // namespace et_moe::cpu
