"""Rounding to INT8 with one scale per tile, as `et_moe.backends.ops.quantize_int8` defines it."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted

_ZERO_AMAX = tl.constexpr(1e-30)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, half to even


@triton.jit
def compute_int8_scale(amax, EXACT: tl.constexpr = True):
    """(127 / amax, amax / 127), or zeros where amax counts as zero.

    EXACT: as torch computes `127 / tensor`, correctly rounded. bf16 numbers often lie half-way
    between two results; they must round alike, since the next quantization amplifies differences.
    """
    zero = amax < _ZERO_AMAX
    safe = tl.where(zero, 1.0, amax)
    inverse = 127.0 * (tl.div_rn(1.0, safe) if EXACT else 1.0 / safe)
    return tl.where(zero, 0.0, inverse), tl.where(zero, 0.0, amax * (1.0 / 127.0))


@triton.jit
def round_to_int8(x):
    """round_half_even of float32 in [-127, 127], as int32 whose low byte is the int8 result."""
    if is_interpreted():
        return (x + _ROUND).to(tl.int32, bitcast=True)
    # A plain addition could be fused with the multiplication before it, which breaks ties.
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, 0f4B400000;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
    )
