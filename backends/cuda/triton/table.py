"""The ops that have Triton kernels, and the functions that launch them."""

from collections.abc import Callable

from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.embedding.op import embedding_w4, embedding_w8
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net, gated_delta_rule
from et_moe.backends.cuda.triton.linear.dense import linear
from et_moe.backends.cuda.triton.linear.op import (
    linear_w4a8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
)
from et_moe.backends.cuda.triton.linear.row_quantization import rms_norm
from et_moe.backends.cuda.triton.moe.op import (
    moe,
    moe_w4a8,
    moe_w4a16,
    moe_w8a8,
    moe_w8a16,
)
from et_moe.backends.cuda.triton.quantization.op import quantize_int8, silu_quantize_int8
from et_moe.backends.cuda.triton.router.op import moe_router
from et_moe.backends.cuda.triton.sampling.op import sample
from et_moe.backends.cuda.triton.token_shift.op import token_shift

TRITON_OPS: dict[str, Callable] = {
    "attention": attention,
    "causal_conv1d": causal_conv1d,
    "embedding_w4": embedding_w4,
    "embedding_w8": embedding_w8,
    "gated_delta_net": gated_delta_net,
    "gated_delta_rule": gated_delta_rule,
    "linear": linear,
    "linear_w4a8": linear_w4a8,
    "linear_w4a16": linear_w4a16,
    "linear_w8a8": linear_w8a8,
    "linear_w8a16": linear_w8a16,
    "moe": moe,
    "moe_router": moe_router,
    "moe_w4a8": moe_w4a8,
    "moe_w4a16": moe_w4a16,
    "moe_w8a8": moe_w8a8,
    "moe_w8a16": moe_w8a16,
    "quantize_int8": quantize_int8,
    "rms_norm": rms_norm,
    "sample": sample,
    "silu_quantize_int8": silu_quantize_int8,
    "token_shift": token_shift,
}
"""Name of an op of the `et_moe` namespace -> the function that launches its kernels.

A function has the parameters of the op's contract in `et_moe.backends.ops`, in the same order and
with the same defaults, except that weights which the kernels want in another order are prepacked
(`et_moe.backends.cuda.prepack`). What it takes by keyword only is for ops that are computed
together (`et_moe.backends.cuda.fusion`).
"""
