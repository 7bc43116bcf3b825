"""The gated delta net layer: a token in a step, a prompt in chunks of tokens."""

import torch

from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.common.compile_case import CompileCase
from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.gated_delta_net.chunk import Gating, chunk_gated_delta
from et_moe.backends.cuda.triton.gated_delta_net.step import step_gated_delta
from et_moe.backends.cuda.triton.linear.decode import linear_decode
from et_moe.backends.cuda.triton.linear.op import check_linear, example_weight

__all__ = [
    "causal_conv1d",
    "compile_cases",
    "gated_delta_net",
    "gated_delta_net_projected",
    "gated_delta_rule",
]


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `et_moe.backends.ops.gated_delta_rule`. Dk and Dv are powers of two, at least 16."""
    run = step_gated_delta if is_one(v.shape[0]) else chunk_gated_delta
    return run((q, k, v), (0, 0), (g, beta), state, num_tokens, q.shape[1]).view(v.shape)


def _behind_convolution(
    qkv: torch.Tensor,
    channels: int,
    gating: Gating,
    state: torch.Tensor,
    num_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """What `gated_delta_net` makes of its convolution, the first channels of qkv's rows."""
    heads, key_dim, value_dim = state.shape
    keys = (channels - heads * value_dim) // 2
    run = step_gated_delta if is_one(qkv.shape[0]) else chunk_gated_delta
    return run((qkv, qkv, qkv), (keys, 2 * keys), gating, state, num_tokens, keys // key_dim)


def gated_delta_net(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `et_moe.backends.ops.gated_delta_net`. Dk and Dv are powers of two, at least 16."""
    qkv = causal_conv1d(projected, conv_weight, conv_state, num_tokens)
    gating = Gating(projected, a_log, dt_bias, norm_weight, eps)
    return _behind_convolution(qkv, conv_weight.shape[0], gating, recurrent_state, num_tokens)


def gated_delta_net_projected(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    input_norm_weight: torch.Tensor | None,
    input_eps: float,
    planes: int,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """A projection of one token x `[1, K]` and `gated_delta_net`: two launches, of which the first
    ends with the convolution.

    Args:
        x, weight, scale, group_size, input_norm_weight, input_eps: as `linear_w4a8` (planes 1) or
            `linear_w4a16` (2) takes them, K one that `linear_decode.takes`.
        conv_weight, a_log, dt_bias, norm_weight, conv_state, recurrent_state, eps: as
            `gated_delta_net` takes them.

    Returns:
        `[1, V]` in x's dtype, as from the two ops.

    Raises:
        ValueError: the projection's arguments do not fit each other.
    """
    check_linear(x, weight, scale, group_size, input_norm_weight, None)
    projected = linear_decode(
        x.contiguous(),
        weight,
        scale,
        group_size,
        input_norm_weight,
        input_eps,
        None,
        planes,
        (conv_weight, conv_state),
    )
    gating = Gating(projected, a_log, dt_bias, norm_weight, eps)
    return _behind_convolution(projected, conv_weight.shape[0], gating, recurrent_state, None)


def _compile_case(
    name: str, dtype: torch.dtype, key_heads: int, heads: int, dim: int
) -> CompileCase:
    values, taps = heads * dim, 4
    channels = 2 * key_heads * dim + values

    def arguments(m, device):
        def normal(*shape, dtype=dtype):
            return torch.randn(shape, device=device).to(dtype)

        return {
            "projected": normal(m, channels + values + 2 * heads),
            "conv_weight": normal(channels, taps),
            "a_log": normal(heads),
            "dt_bias": normal(heads),
            "norm_weight": normal(dim),
            "conv_state": normal(taps - 1, channels),
            "recurrent_state": normal(heads, dim, dim, dtype=torch.float32),
            "num_tokens": None if m == 1 else torch.full((1,), m, device=device),
        }

    tables = ("causal_conv1d", "gated_delta_prepare", "gated_delta_norm", "gated_delta_step")
    scan = "gated_delta_scan_fp32" if dtype == torch.float32 else "gated_delta_scan"
    streams = {"_step_kernel": ("state_ptr",)}
    tables = (*tables, scan)
    return CompileCase(
        f"gated_delta_net/{name}",
        gated_delta_net,
        arguments,
        tables,
        streams=streams,
    )


def _projected_case(planes: int) -> CompileCase:
    net, hidden = _compile_case("", torch.bfloat16, 16, 32, 128).arguments, 2048

    def arguments(m, device):
        given = net(m, device)
        n = given.pop("projected").shape[1]
        del given["num_tokens"]
        return given | {
            "x": torch.randn((m, hidden), device=device).bfloat16(),
            **example_weight(n, hidden, device),
            "input_norm_weight": torch.randn(hidden, device=device).bfloat16(),
            "input_eps": 1e-6,
            "planes": planes,
            "eps": 1e-6,
        }

    return CompileCase(
        f"gated_delta_net_projected/w4a{8 * planes}",
        gated_delta_net_projected,
        arguments,
        tables=("linear_gemv", "gated_delta_step"),
        tokens=(1,),
        streams={"_w4_gemv_kernel": ("weight",), "_step_kernel": ("state_ptr",)},
    )


def _rule_case() -> CompileCase:
    key_heads, heads, dim = 16, 32, 128

    def arguments(m, device):
        def bf16(*shape):
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        return {
            "q": bf16(m, key_heads, dim),
            "k": bf16(m, key_heads, dim),
            "v": bf16(m, heads, dim),
            "g": -torch.rand(m, heads, device=device),
            "beta": torch.rand(m, heads, device=device),
            "state": torch.zeros(heads, dim, dim, device=device),
        }

    tables = ("gated_delta_prepare", "gated_delta_scan", "gated_delta_step")
    streams = {"_step_kernel": ("state_ptr",)}
    return CompileCase("gated_delta_rule", gated_delta_rule, arguments, tables, streams=streams)


def compile_cases() -> list[CompileCase]:
    """The gated delta net of Qwen3.5-35B-A3B, with its projection, its rule alone; small ones."""
    return [
        _projected_case(1),
        _projected_case(2),
        _rule_case(),
        _compile_case("qwen3_5_35b", torch.bfloat16, 16, 32, 128),
        _compile_case("small_fp32", torch.float32, 2, 4, 64),
        _compile_case("narrow", torch.bfloat16, 2, 4, 32),
    ]


def tune_candidates() -> dict[str, list[dict]]:
    """Configurations worth trying, by table."""
    scan = ((16, 2, 4), (32, 2, 4), (32, 3, 4), (64, 2, 4), (64, 2, 8), (64, 3, 4))
    conv = ((4, 64, 2), (8, 256, 1), (8, 512, 2), (8, 1024, 4), (16, 256, 1), (16, 512, 2))
    return {
        "gated_delta_step": [{"num_warps": w} for w in (2, 4, 8, 16)],
        "gated_delta_prepare": [{"num_warps": w, "num_stages": 1} for w in (4, 8)],
        "gated_delta_scan": [{"BLOCK_V": v, "STAGES": s, "num_warps": w} for v, s, w in scan],
        "gated_delta_norm": [{"ROWS": r, "num_warps": 4} for r in (16, 32, 64)],
        "causal_conv1d": [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": w} for t, c, w in conv],
    }
