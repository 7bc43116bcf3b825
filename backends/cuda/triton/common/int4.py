"""INT4 weights in registers: how prepacked nibbles become operands of integer dot products.

Prepacked weights (`linear/layout.py`, `moe/layout.py`) are nibbles in two's complement. Both
nibbles of a byte are used in its upper half, as 16 times their value: a shift and an AND unpack
four low nibbles, one AND four high ones, and no offset has to be subtracted. `NIBBLE_SCALE`, a
factor of the weight's scale, makes up for the 16.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted

NIBBLE_SCALE = tl.constexpr(0.0625)
UPPER_NIBBLES = tl.constexpr(-0x0F0F0F10)
"""0xF0F0F0F0, the mask of the upper nibbles of the four bytes of an int32."""


@triton.jit
def extract_low_nibbles(packed):
    """16 times the low nibbles of int8 numbers, as int8 of the same shape."""
    if is_interpreted():
        return packed << 4
    # This takes the four bytes of a register at a time. Element-wise shifts of int8 would cost
    # several times as much.
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def extract_high_nibbles(packed):
    """16 times the high nibbles of int8 numbers, as int8 of the same shape."""
    if is_interpreted():
        return packed & -16
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def dot_bytes(a, b, c):
    """c + the dot product of the four int8 in each int32 of a and of b; all int32, broadcast."""
    if is_interpreted():
        for i in tl.static_range(4):
            c = c + ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return c
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def dot_words(w, q, d):
    """d + the dot products of the bytes in four words of w and of q, word by word."""
    for i in tl.static_range(4):
        d = dot_bytes(w[i], q[i], d)
    return d


@triton.jit
def pack_bytes(a, b, c, d):
    """One int32 of the low bytes of four, with the byte of a as the lowest."""
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
