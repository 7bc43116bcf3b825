"""Matrix products on tensor cores for bf16 and fp32 models alike, accumulated in fp32."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted


@triton.jit
def round_to_type(x, like):
    """x rounded to the element type of the pointer `like`; under the interpreter, then fp32."""
    x = x.to(like.dtype.element_ty)
    if is_interpreted():
        x = x.to(tl.float32)  # the interpreter multiplies the bits of bf16 as integers
    return x


@triton.jit
def dot(a, b, like):
    """a @ b in fp32, `[M, K]` times `[K, N]`.

    Operands are rounded to the element type of the pointer `like`, bf16 or fp32. A product of fp32
    is made of three tf32 products.
    """
    return tl.dot(round_to_type(a, like), round_to_type(b, like), input_precision="tf32x3")


@triton.jit
def add_dot(a, b, acc, like):
    """acc + a @ b, with the same rounding as in `dot`."""
    return tl.dot(round_to_type(a, like), round_to_type(b, like), acc, input_precision="tf32x3")
