"""INT4 and INT8 weights as the words of four bytes that a thread multiplies with its columns of x.

Kernels know the two formats by BITS, 4 or 8, and choose by `if` and `else`: what stands behind an
`if` that returns would be compiled, too. A row of a weight is cut into blocks of 128 bytes,
which hold 8 / BITS runs of 128 columns, the parts of the block. An INT4 weight has its scales
beside each part (`layout.py`), an INT8 weight has one of each row.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.int4 import UPPER_NIBBLES, dot_words
from et_moe.backends.cuda.triton.common.interpreter import is_interpreted


@triton.jit
def unpack_words(words, PART: tl.constexpr, BITS: tl.constexpr):
    """Four INT8 weights an int32: those of one part of a block.

    Of INT4 weights they are 16 times the nibbles, part 0 the low ones and 1 the high ones.
    """
    if BITS == 8:
        return words
    elif PART == 0:
        return (words << 4) & UPPER_NIBBLES
    else:
        return words & UPPER_NIBBLES


@triton.jit
def forget_words(words):
    """The same int32, of which the compiler does not know where they come from.

    In a loop it would unpack weights ahead of the first iteration, into twice the registers.
    """
    if is_interpreted():
        return words
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def multiply_parts(w, q, q0, zero, PLANES: tl.constexpr):
    """Integer products of a thread's words with its columns of a row, int32, of each part.

    Args:
        w: of each part four words of the weights; q, q0: the planes of the row in the same form,
            of which the second counts if PLANES is 2.
        zero: int32 zeros of the shape of the result.
    """
    sums = ()
    for part in tl.static_range(len(w)):
        sums += (dot_words(w[part], q[part], zero),)
    if PLANES == 1:
        return sums
    else:
        both = ()
        for part in tl.static_range(len(w)):
            both += (dot_words(w[part], q0[part], sums[part] << 7),)
        return both


# The bits of 1.5 * 2^23 as fp32, whose neighbours are 1 apart.
_FLOAT_BIAS = tl.constexpr(0x4B400000)


@triton.jit
def multiply_parts_as_floats(w, q, q0, zero, PLANES: tl.constexpr):
    """The results of `multiply_parts` as fp32.

    Those of one plane are summed up on top of an fp32 number's bits, and that number is subtracted:
    both are exact, since 16 products stay below 2^22. To convert integers takes several times as
    long as to add.
    """
    floats = ()
    if PLANES == 1:
        sums = multiply_parts(w, q, q0, zero + _FLOAT_BIAS, PLANES)
        for part in tl.static_range(len(w)):
            floats += (sums[part].to(tl.float32, bitcast=True) - 12582912.0,)
    else:
        sums = multiply_parts(w, q, q0, zero, PLANES)
        for part in tl.static_range(len(w)):
            floats += (sums[part].to(tl.float32),)
    return floats


@triton.jit
def multiply_apart(a, b):
    """a * b, fp32 of one shape, as a number of its own.

    A plain product the compiler would fuse with a sum behind it, and with which of the sum's
    products, it chooses for each kernel.
    """
    # Adding 0 makes it a fused multiply-add already. It changes nothing but the sign of a zero.
    return tl.fma(a, b, tl.zeros(a.shape, tl.float32))
