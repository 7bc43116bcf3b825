"""Op contracts: each op declared once, with an eager reference that is the definition of right.

`ops.<name>` is the eager reference; `torch.ops.et_moe.<name>` the op that graphs are made of.
"""

from et_moe.backends.ops.attention import attention
from et_moe.backends.ops.gated_delta_net import causal_conv1d, gated_delta_net, gated_delta_rule
from et_moe.backends.ops.linear import (
    embedding_w4,
    embedding_w8,
    linear,
    linear_w4a8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
    rms_norm,
)
from et_moe.backends.ops.moe import moe, moe_router, moe_w4a8, moe_w4a16, moe_w8a8, moe_w8a16
from et_moe.backends.ops.quantization import (
    ACTIVATION_TILE,
    GROUP_SIZES,
    SCALE_DTYPES,
    check_finite,
    dequantize_w4,
    dequantize_w8,
    expert_activation_tile,
    pack_int4,
    quantize_int8,
    quantize_w4,
    quantize_w8,
    silu_quantize_int8,
    unpack_int4,
)
from et_moe.backends.ops.sampling import sample
from et_moe.backends.ops.sequences import PAGE_SIZE
from et_moe.backends.ops.token_shift import token_shift

__all__ = [
    "ACTIVATION_TILE",
    "GROUP_SIZES",
    "PAGE_SIZE",
    "SCALE_DTYPES",
    "attention",
    "causal_conv1d",
    "check_finite",
    "dequantize_w4",
    "dequantize_w8",
    "embedding_w4",
    "embedding_w8",
    "expert_activation_tile",
    "gated_delta_net",
    "gated_delta_rule",
    "linear",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "moe",
    "moe_router",
    "moe_w4a8",
    "moe_w4a16",
    "moe_w8a8",
    "moe_w8a16",
    "pack_int4",
    "quantize_int8",
    "quantize_w4",
    "quantize_w8",
    "rms_norm",
    "sample",
    "silu_quantize_int8",
    "token_shift",
    "unpack_int4",
]
