// Compiled for AVX2, FMA and AVX-VNNI.
#include "backends/cpu/dot_256.h"

namespace et_moe::cpu {
namespace {

struct Dpbusd {
  static __m256i add(__m256i bias, __m256i low, __m256i even, __m256i high, __m256i odd) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(bias, low, even), high, odd);
  }
};

}  // namespace

void dot_avxvnni(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
                 float* out, int64_t stride) {
  dot<Isa256<Dpbusd>>(weights, rows, x, tokens, out, stride);
}

}  // namespace et_moe::cpu
