"""The gated delta net of Qwen3.5-35B-A3B, with its projection, and its rule alone; small ones.

In the case of a batch m is the number of sequences.
"""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor
from et_moe.backends.cuda.triton.gated_delta_net.chunk import scan_table
from et_moe.backends.cuda.triton.gated_delta_net.op import (
    gated_delta_net,
    gated_delta_net_projected,
    gated_delta_rule,
)
from et_moe.backends.cuda.triton.linear.cases import example_weight

_STREAMS = {"_step_kernel": ("state_ptr",)}


def net_arguments(
    dtype: torch.dtype,
    key_heads: int,
    heads: int,
    head_dim: int,
    batch: bool = False,
    versions: int = 0,
    each_row: bool = False,
    state_dtype: torch.dtype = torch.float32,
):
    """Arguments of m tokens of one sequence or, if batch, of one token of each of m sequences.

    versions: of the states, if they have any. state_dtype: of the recurrent state.
    """
    values, taps = heads * head_dim, 4
    channels = 2 * key_heads * head_dim + values

    def arguments(m, device):
        def normal(*shape):
            return random_tensor(*shape, device=device, dtype=dtype)

        sequences, count = (m, 1) if batch else (1, m)
        own = (versions,) if versions else ()
        taken = {"versions": torch.zeros(sequences, dtype=torch.int64, device=device)}
        taken |= {"each_row": each_row}
        return (taken if versions else {}) | {
            "projected": normal(m, channels + values + 2 * heads),
            "conv_weight": normal(channels, taps),
            "a_log": normal(heads),
            "dt_bias": normal(heads),
            "norm_weight": normal(head_dim),
            "conv_state": normal(sequences, taps - 2 + max(versions, 1), channels),
            "recurrent_state": random_tensor(
                sequences, *own, heads, *2 * (head_dim,), device=device, dtype=state_dtype
            ),
            "slots": torch.arange(sequences, dtype=torch.int32, device=device),
            "num_tokens": None if m == 1 else torch.full((sequences,), count, device=device),
        }

    return arguments


def _net_case(name: str, *shape, **options) -> OpCase:
    tables = ("causal_conv1d", "gated_delta_prepare", "gated_delta_norm")
    scan = scan_table(shape[0], options.get("state_dtype", torch.float32))
    tables = (*tables, scan, "causal_conv1d_step", "gated_delta_step")
    arguments = net_arguments(*shape, **options)
    return OpCase(f"gated_delta_net/{name}", gated_delta_net, arguments, tables, streams=_STREAMS)


def _short_case(name: str, *shape, **options) -> OpCase:
    """Prompts of up to 4 and of up to 16 tokens."""
    arguments = net_arguments(*shape, **options)
    streams = {"_few_tokens_kernel": ("state_ptr",)}
    name = f"gated_delta_net/{name}_short"
    return OpCase(name, gated_delta_net, arguments, tokens=(4, 16), streams=streams)


def _batch_case(name: str, *shape, **options) -> OpCase:
    return OpCase(
        f"gated_delta_net/{name}_batch",
        gated_delta_net,
        net_arguments(*shape, batch=True, **options),
        ("causal_conv1d_step",),
        tokens=(7,),
        streams=_STREAMS,
    )


def _versions_case(name: str, *shape, **options) -> OpCase:
    arguments = net_arguments(*shape, versions=4, **options)
    return OpCase(f"gated_delta_net/{name}_versions", gated_delta_net, arguments, streams=_STREAMS)


def _drafts_case(name: str, *shape, **options) -> OpCase:
    return OpCase(
        f"gated_delta_net/{name}_drafts",
        gated_delta_net,
        net_arguments(*shape, versions=4, each_row=True, **options),
        tokens=(2, 3, 4),
        streams=_STREAMS,
    )


QWEN3_5_35B = (torch.bfloat16, 16, 32, 128)
_BF16_STATE = {"state_dtype": torch.bfloat16}


def _projected_case(
    planes: int,
    bits: int,
    what: str = "",
    tokens: tuple[int, ...] = (1,),
    versions: int = 0,
    **rows: bool,
) -> OpCase:
    """rows: which rows there are, as `net_arguments` takes it."""
    hidden = 2048

    def arguments(m, device):
        given = net_arguments(*QWEN3_5_35B, versions=versions, **rows)(m, device)
        n = given.pop("projected").shape[1]
        return given | {
            "x": random_tensor(m, hidden, device=device),
            **({"group_size": None} | example_weight(n, hidden, device, bits)),
            "input_norm_weight": random_tensor(hidden, device=device),
            "input_eps": 1e-6,
            "planes": planes,
            "eps": 1e-6,
        }

    kernel = "_gemv_kernel" if tokens == (1,) else "_gemv_loop_kernel"
    return OpCase(
        f"gated_delta_net_projected/w{bits}a{8 * planes}{what}",
        gated_delta_net_projected,
        arguments,
        tables=(f"linear_w{bits}_gemv", "gated_delta_step"),
        tokens=tokens,
        streams={kernel: ("weight",), **_STREAMS},
    )


def _rule_arguments(m: int, device: torch.device) -> dict:
    key_heads, heads, head_dim = 16, 32, 128
    return {
        "q": random_tensor(m, key_heads, head_dim, device=device),
        "k": random_tensor(m, key_heads, head_dim, device=device),
        "v": random_tensor(m, heads, head_dim, device=device),
        "g": -torch.rand(m, heads, device=device),
        "beta": torch.rand(m, heads, device=device),
        "state": torch.zeros(1, heads, head_dim, head_dim, device=device),
        "slots": torch.zeros(1, dtype=torch.int32, device=device),
    }


CASES = [
    _projected_case(1, bits=4),
    _projected_case(2, bits=4),
    _projected_case(1, bits=8),
    _projected_case(1, bits=4, what="_versions", versions=4),
    _projected_case(1, bits=4, what="_drafts", tokens=(2, 3, 4), versions=4, each_row=True),
    _projected_case(1, bits=8, what="_drafts", tokens=(2,), versions=4, each_row=True),
    _projected_case(1, bits=4, what="_batch", tokens=(3,), batch=True),
    OpCase(
        "gated_delta_rule",
        gated_delta_rule,
        _rule_arguments,
        tables=("gated_delta_prepare", "gated_delta_scan", "gated_delta_step"),
        streams=_STREAMS,
    ),
    OpCase(
        "gated_delta_rule/short",
        gated_delta_rule,
        _rule_arguments,
        tokens=(4, 16),
        streams={"_few_tokens_kernel": ("state_ptr",)},
    ),
    _net_case("qwen3_5_35b", *QWEN3_5_35B),
    _batch_case("qwen3_5_35b", *QWEN3_5_35B),
    _versions_case("qwen3_5_35b", *QWEN3_5_35B),
    _drafts_case("qwen3_5_35b", *QWEN3_5_35B),
    _net_case("qwen3_5_35b_bf16_state", *QWEN3_5_35B, **_BF16_STATE),
    _batch_case("qwen3_5_35b_bf16_state", *QWEN3_5_35B, **_BF16_STATE),
    _versions_case("qwen3_5_35b_bf16_state", *QWEN3_5_35B, **_BF16_STATE),
    _drafts_case("qwen3_5_35b_bf16_state", *QWEN3_5_35B, **_BF16_STATE),
    _net_case("small_fp32_bf16_state", torch.float32, 2, 4, 64, **_BF16_STATE),
    _drafts_case("small_fp32", torch.float32, 2, 4, 64),
    _net_case("small_fp32", torch.float32, 2, 4, 64),
    _short_case("qwen3_5_35b", *QWEN3_5_35B),
    _short_case("qwen3_5_35b_bf16_state", *QWEN3_5_35B, **_BF16_STATE),
    _short_case("small_fp32", torch.float32, 2, 4, 64),
    _net_case("narrow", torch.bfloat16, 2, 4, 32),
]

_SCAN = ((16, 2, 4), (32, 2, 4), (32, 3, 4), (64, 2, 4), (64, 2, 8), (64, 3, 4))

CANDIDATES = {
    "gated_delta_step": [{"num_warps": w} for w in (2, 4, 8, 16)],
    "gated_delta_prepare": [{"num_warps": w, "num_stages": 1} for w in (4, 8)],
    **{
        table: [{"BLOCK_V": v, "STAGES": s, "num_warps": w} for v, s, w in _SCAN]
        for table in ("gated_delta_scan", "gated_delta_scan_bf16_state")
    },
    "gated_delta_norm": [{"ROWS": r, "num_warps": 4} for r in (16, 32, 64)],
}
