"""The gated delta net of Qwen3.5-35B-A3B, with its projection, and its rule alone; small ones."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor
from et_moe.backends.cuda.triton.gated_delta_net.op import (
    gated_delta_net,
    gated_delta_net_projected,
    gated_delta_rule,
)
from et_moe.backends.cuda.triton.linear.cases import example_weight

_STREAMS = {"_step_kernel": ("state_ptr",)}


def _net_case(name: str, dtype: torch.dtype, key_heads: int, heads: int, head_dim: int) -> OpCase:
    values, taps = heads * head_dim, 4
    channels = 2 * key_heads * head_dim + values

    def arguments(m, device):
        def normal(*shape):
            return random_tensor(*shape, device=device, dtype=dtype)

        return {
            "projected": normal(m, channels + values + 2 * heads),
            "conv_weight": normal(channels, taps),
            "a_log": normal(heads),
            "dt_bias": normal(heads),
            "norm_weight": normal(head_dim),
            "conv_state": normal(taps - 1, channels),
            "recurrent_state": torch.randn(heads, head_dim, head_dim, device=device),
            "num_tokens": None if m == 1 else torch.full((1,), m, device=device),
        }

    tables = ("causal_conv1d", "gated_delta_prepare", "gated_delta_norm", "gated_delta_step")
    scan = "gated_delta_scan_fp32" if dtype == torch.float32 else "gated_delta_scan"
    return OpCase(
        f"gated_delta_net/{name}", gated_delta_net, arguments, (*tables, scan), streams=_STREAMS
    )


_QWEN3_5_35B = _net_case("qwen3_5_35b", torch.bfloat16, 16, 32, 128)


def _projected_case(planes: int) -> OpCase:
    hidden = 2048

    def arguments(m, device):
        given = _QWEN3_5_35B.arguments(m, device)
        n = given.pop("projected").shape[1]
        del given["num_tokens"]
        return given | {
            "x": random_tensor(m, hidden, device=device),
            **example_weight(n, hidden, device),
            "input_norm_weight": random_tensor(hidden, device=device),
            "input_eps": 1e-6,
            "planes": planes,
            "eps": 1e-6,
        }

    return OpCase(
        f"gated_delta_net_projected/w4a{8 * planes}",
        gated_delta_net_projected,
        arguments,
        tables=("linear_gemv", "gated_delta_step"),
        tokens=(1,),
        streams={"_w4_gemv_kernel": ("weight",), **_STREAMS},
    )


def _rule_arguments(m: int, device: torch.device) -> dict:
    key_heads, heads, head_dim = 16, 32, 128
    return {
        "q": random_tensor(m, key_heads, head_dim, device=device),
        "k": random_tensor(m, key_heads, head_dim, device=device),
        "v": random_tensor(m, heads, head_dim, device=device),
        "g": -torch.rand(m, heads, device=device),
        "beta": torch.rand(m, heads, device=device),
        "state": torch.zeros(heads, head_dim, head_dim, device=device),
    }


CASES = [
    _projected_case(1),
    _projected_case(2),
    OpCase(
        "gated_delta_rule",
        gated_delta_rule,
        _rule_arguments,
        tables=("gated_delta_prepare", "gated_delta_scan", "gated_delta_step"),
        streams=_STREAMS,
    ),
    _QWEN3_5_35B,
    _net_case("small_fp32", torch.float32, 2, 4, 64),
    _net_case("narrow", torch.bfloat16, 2, 4, 32),
]

_SCAN = ((16, 2, 4), (32, 2, 4), (32, 3, 4), (64, 2, 4), (64, 2, 8), (64, 3, 4))

CANDIDATES = {
    "gated_delta_step": [{"num_warps": w} for w in (2, 4, 8, 16)],
    "gated_delta_prepare": [{"num_warps": w, "num_stages": 1} for w in (4, 8)],
    "gated_delta_scan": [{"BLOCK_V": v, "STAGES": s, "num_warps": w} for v, s, w in _SCAN],
    "gated_delta_norm": [{"ROWS": r, "num_warps": 4} for r in (16, 32, 64)],
}
