"""INT4 weights in registers: how prepacked nibbles become operands of integer dot products.

Prepacked weights (see `prepack`) hold two's complement nibbles; byte j of a tile of 128 columns
has column j in its low and column j + 64 in its high nibble. Both nibbles are used in the upper
half of a byte, as 16 * value: one AND (high) or a shift and an AND (low) unpacks four weights, and
no offset has to be subtracted. `NIBBLE_SCALE` undoes the factor 16 on the weight scale.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted

NIBBLE_SCALE = tl.constexpr(0.0625)
UPPER_NIBBLES = tl.constexpr(-0x0F0F0F10)
"""0xF0F0F0F0: of the four bytes of an int32."""


@triton.jit
def low_nibbles(packed):
    """16 * the low nibbles of int8 bytes, as int8."""
    if is_interpreted():
        return packed << 4
    # Four bytes of a register at a time; element-wise shifts of int8 would cost several times that.
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def high_nibbles(packed):
    """16 * the high nibbles of int8 bytes, as int8."""
    if is_interpreted():
        return packed & -16
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def dot_bytes(a, b, c):
    """c + the dot product of the four int8 in each int32 of a and b; the shapes broadcast."""
    if is_interpreted():
        for i in tl.static_range(4):
            c = c + ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return c
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def pack_bytes(a, b, c, d):
    """The low bytes of four int32 as one int32, a's the lowest."""
    if is_interpreted():
        return (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 low, high; prmt.b32 low, $1, $2, 0x0040; prmt.b32 high, $3, $4, 0x0040;"
        " prmt.b32 $0, low, high, 0x5410; }",
        "=r,r,r,r,r",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
