"""Rounding to INT8 with one scale per tile, as `et_moe.backends.ops.quantize_int8` defines it."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted

_ZERO_AMAX = tl.constexpr(1e-30)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, half to even


@triton.jit
def compute_int8_scale(amax, EXACT: tl.constexpr = True):
    """The factors from float to INT8 and back, both fp32 of the shape of amax.

    Args:
        amax: fp32, the largest magnitude of each tile.
        EXACT: whether 127 / amax is rounded correctly, as torch's is. bf16 numbers often lie
            half-way between two results. They must be rounded as torch rounds them, since the next
            quantization amplifies a difference.

    Returns:
        127 / amax and amax / 127; zeros for tiles that count as zero (amax below 1e-30).
    """
    zero = amax < _ZERO_AMAX
    safe = tl.where(zero, 1.0, amax)
    inverse = 127.0 * (tl.div_rn(1.0, safe) if EXACT else 1.0 / safe)
    return tl.where(zero, 0.0, inverse), tl.where(zero, 0.0, amax * (1.0 / 127.0))


@triton.jit
def round_to_int8(x):
    """fp32 in [-127, 127] rounded half to even: int32 whose low byte is the result, as int8."""
    if is_interpreted():
        return (x + _ROUND).to(tl.int32, bitcast=True)
    # The compiler could fuse a plain addition with the multiplication before it, and ties would be
    # rounded another way.
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, 0f4B400000;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
    )
