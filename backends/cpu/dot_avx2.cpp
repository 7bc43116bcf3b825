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

  // Pairs of products with unsigned weights would not fit int16. Those of magnitudes do (at most
  // 128 * 127 * 2), and need no bias.
  static __m256i add_int8(__m256i, __m256i first_w, __m256i first, __m256i second_w,
                          __m256i second) {
    const auto multiply = [](__m256i w, __m256i x) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
      return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    };
    return _mm256_add_epi32(multiply(first_w, first), multiply(second_w, second));
  }
};

}  // namespace

const DotFunctions dot_avx2 = kDotFunctions<Isa256<Maddubs>>;

}  // namespace et_moe::cpu
