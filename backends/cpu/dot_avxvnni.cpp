// Compiled for AVX2, FMA and AVX-VNNI.
#include "backends/cpu/dot_256.h"

namespace et_moe::cpu {
namespace {

struct Dpbusd {
  static __m256i add(__m256i bias, __m256i low, __m256i even, __m256i high, __m256i odd) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(bias, low, even), high, odd);
  }

  static __m256i add_int8(__m256i bias, __m256i first_w, __m256i first, __m256i second_w,
                          __m256i second) {
    const __m256i sign = _mm256_set1_epi8(-128);  // flipping it adds 128
    return add(bias, _mm256_xor_si256(first_w, sign), first, _mm256_xor_si256(second_w, sign),
               second);
  }
};

}  // namespace

const DotFunctions dot_avxvnni = kDotFunctions<Isa256<Dpbusd>>;

}  // namespace et_moe::cpu
