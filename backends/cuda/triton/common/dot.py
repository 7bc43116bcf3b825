"""Matrix products on tensor cores for bf16 and fp32 models alike, accumulated in fp32."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted


@triton.jit
def rounded(x, like):
    """x rounded to the element type of the pointer `like`."""
    x = x.to(like.dtype.element_ty)
    if is_interpreted():
        x = x.to(tl.float32)  # the interpreter multiplies the bits of bf16 as integers
    return x


@triton.jit
def dot(a, b, like):
    """a @ b with operands rounded to the element type of `like`: bf16, or fp32 as three tf32."""
    return tl.dot(rounded(a, like), rounded(b, like), input_precision="tf32x3")


@triton.jit
def add_dot(a, b, acc, like):
    """acc + a @ b, likewise."""
    return tl.dot(rounded(a, like), rounded(b, like), acc, input_precision="tf32x3")
