"""RMSNorm (Zhang and Sennrich, 2019) with a zero-centred weight, in registers."""

import triton
import triton.language as tl


@triton.jit
def apply_rms_norm(x, norm_weight, mean_square, eps, DTYPE: tl.constexpr):
    """x * rsqrt(mean_square + eps) * (1 + norm_weight), rounded to DTYPE, as fp32.

    All but eps broadcast; x and mean_square are fp32.
    """
    y = x * tl.rsqrt(mean_square + eps) * (1.0 + norm_weight.to(tl.float32))
    return y.to(DTYPE).to(tl.float32)
