"""SiLU, the activation of the experts, of the convolution and of the delta net's gate."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted


@triton.jit
def silu(x):
    """x * sigmoid(x) of fp32, to within a few units in the last place."""
    if is_interpreted():
        return x / (1.0 + tl.exp(-x))
    # exp and the reciprocal without regard for denormals take five instructions instead of twenty.
    return x * tl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
        " add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
