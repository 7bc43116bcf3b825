"""The gated delta net layer: a decode step in one launch, a prompt in chunks of tokens."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.causal_conv1d import (
    causal_conv1d,
    silu,
    update_conv_state,
    valid_tokens,
)
from et_moe.backends.cuda.triton.compile_case import CompileCase
from et_moe.backends.cuda.triton.dependent_launch import start_next, wait_for_previous
from et_moe.backends.cuda.triton.gated_delta_chunk import Gating, chunk_gated_delta, delta_gates
from et_moe.backends.cuda.triton.launch import launch
from et_moe.backends.cuda.triton.tuning import tuned

__all__ = ["causal_conv1d", "compile_cases", "gated_delta_net", "gated_delta_rule"]


@triton.jit
def _pin(x):
    """The vector x, computed once.

    The compiler would compute a vector anew for every layout in which it meets a matrix, loads
    included; it seldom does so through a reduction.
    """
    return tl.sum(x[None, :], 0)


@triton.jit
def _conv_step(
    x_ptr,
    weight_ptr,
    state_ptr,
    channel,
    mask,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """SiLU of the convolution of one token, `fp32 [N]`; with TAPS = 0 a plain load."""
    x = tl.load(x_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if TAPS > 0:
        weight_ptr += channel * TAPS
        x *= tl.load(weight_ptr + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
        for i in tl.static_range(TAPS - 1):
            older = tl.load(state_ptr + i * CHANNELS + channel, mask=mask, other=0.0)
            weight = tl.load(weight_ptr + i, mask=mask, other=0.0)
            x += older.to(tl.float32) * weight.to(tl.float32)
        x = silu(x)
    return _pin(x)


@triton.jit
def _add_2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    b_ptr,
    a_ptr,
    conv_weight_ptr,
    conv_state_ptr,
    a_log_ptr,
    dt_bias_ptr,
    norm_weight_ptr,
    num_tokens_ptr,
    state_ptr,
    out_ptr,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
):
    """One token of one key head and its GROUP value heads, from the projected row to the output.

    A program owns all it writes: its channels of the convolution's state (q and k channels serve
    every value head of the group) and its heads of the recurrent state, which it reads once, as
    `[Dk, GROUP * Dv]`, and writes once. With q and k scaled to unit length,

        delta = beta (v - exp(g) k^T S)
        o = exp(g) q^T S + (q . k) delta
        S <- exp(g) S + k delta^T

    TAPS = 0 leaves out the convolution, the gates and the norm, as in `gated_delta_chunk`. What
    counts here is latency: loads come first, that of the state before the projected row exists, and
    products with the state and their norms are reduced together, since every reduction is a
    barrier.
    """
    KEYS: tl.constexpr = KEY_HEADS * DK if TAPS else 0
    VALUES: tl.constexpr = KEY_HEADS * GROUP * DV if TAPS else 0
    CHANNELS: tl.constexpr = 2 * KEYS + VALUES
    HEADS: tl.constexpr = KEY_HEADS * GROUP if TAPS else 0
    key_head = tl.program_id(0)
    dk = tl.arange(0, DK)
    column = tl.arange(0, COLUMNS)
    all_k = dk < DK
    in_group = column < GROUP * DV
    head = key_head * GROUP + column // DV
    value = key_head * (GROUP * DV) + column
    q_channel = key_head * DK + dk
    v_channel = 2 * KEYS + value
    state_tile = state_ptr + head[None, :] * (DK * DV) + dk[:, None] * DV + (column % DV)[None, :]
    start_next()
    state = tl.load(state_tile, mask=in_group[None, :], other=0.0)
    wait_for_previous()
    q = _conv_step(q_ptr, conv_weight_ptr, conv_state_ptr, q_channel, all_k, CHANNELS, TAPS)
    k = _conv_step(k_ptr, conv_weight_ptr, conv_state_ptr, KEYS + q_channel, all_k, CHANNELS, TAPS)
    v = _conv_step(v_ptr, conv_weight_ptr, conv_state_ptr, v_channel, in_group, CHANNELS, TAPS)
    beta = tl.load(b_ptr + CHANNELS + VALUES + head, mask=in_group, other=0.0).to(tl.float32)
    g = tl.load(a_ptr + CHANNELS + VALUES + HEADS + head, mask=in_group, other=0.0).to(tl.float32)
    count = valid_tokens(num_tokens_ptr, 1, HAS_NUM_TOKENS)
    if TAPS > 0:
        a_log = tl.load(a_log_ptr + head, mask=in_group, other=0.0).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + head, mask=in_group, other=0.0).to(tl.float32)
        z = tl.load(v_ptr + CHANNELS + value, mask=in_group, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + column % DV).to(tl.float32)
    if TAPS > 0:
        beta, g = delta_gates(beta, g, a_log, dt_bias)
        z = _pin(norm_weight * silu(z))
        qk = tl.arange(0, 2 * DK)
        channel = tl.where(qk < DK, qk, KEYS - DK + qk) + key_head * DK
        update_conv_state(
            q_ptr, conv_state_ptr, count, channel, qk < 2 * DK, 0, CHANNELS, TAPS, TAPS_P2
        )
        update_conv_state(
            v_ptr, conv_state_ptr, count, v_channel, in_group, 0, CHANNELS, TAPS, TAPS_P2
        )
    decay = _pin(tl.exp(g))
    beta = _pin(beta)

    qq, kk, qk_product = tl.reduce((q * q, k * k, q * k), 0, _add_3)
    q_scale = tl.rsqrt(qq + 1e-6) * DK**-0.5
    k_scale = tl.rsqrt(kk + 1e-6)
    k_state, q_state = tl.reduce((state * k[:, None], state * q[:, None]), 0, _add_2)
    delta = beta * (v - decay * k_scale * k_state)
    o = q_scale * (decay * q_state + k_scale * qk_product * delta)
    state = state * decay[None, :] + k[:, None] * (k_scale * delta)[None, :]
    tl.store(state_tile, state, mask=in_group[None, :] & (count > 0))
    if TAPS > 0:
        o = tl.reshape(o, (COLUMNS // DV, DV))
        o *= tl.rsqrt(tl.sum(o * o, 1) / DV + EPS)[:, None]
        o = tl.reshape(o, (COLUMNS,)) * z
    tl.store(out_ptr + value, o.to(out_ptr.dtype.element_ty), mask=in_group)


def _step(
    sources: tuple[torch.Tensor, ...],
    layer: tuple[torch.Tensor, ...],
    state: torch.Tensor,
    num_tokens: torch.Tensor | None,
    out: torch.Tensor,
    key_heads: int,
    taps: int,
    eps: float,
) -> None:
    heads, key_dim, value_dim = state.shape
    group = heads // key_heads
    launch(
        _step_kernel,
        (key_heads,),
        *sources,
        *layer,
        state if num_tokens is None else num_tokens,
        state,
        out,
        KEY_HEADS=key_heads,
        GROUP=group,
        DK=key_dim,
        DV=value_dim,
        COLUMNS=triton.next_power_of_2(group * value_dim),
        TAPS=taps,
        TAPS_P2=triton.next_power_of_2(max(taps, 1)),
        EPS=eps,
        HAS_NUM_TOKENS=num_tokens is not None,
        **tuned("gated_delta_step", 1),
    )


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
    if isinstance(v.shape[0], int) and v.shape[0] == 1:
        out = torch.empty_like(v)
        _step((q, k, v, beta, g), (q, q, q, q, q), state, num_tokens, out, q.shape[1], 0, 0.0)
        return out
    return chunk_gated_delta((q, k, v), (0, 0), (g, beta), state, num_tokens, q.shape[1]).view(
        v.shape
    )


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
    tokens, (heads, key_dim, value_dim) = projected.shape[0], recurrent_state.shape
    channels, taps = conv_weight.shape
    keys = (channels - heads * value_dim) // 2
    if isinstance(tokens, int) and tokens == 1:
        out = projected.new_empty((1, heads * value_dim))
        layer = (conv_weight, conv_state, a_log, dt_bias, norm_weight)
        _step((projected,) * 5, layer, recurrent_state, num_tokens, out, keys // key_dim, taps, eps)
        return out
    qkv = causal_conv1d(projected, conv_weight, conv_state, num_tokens)
    gating = Gating(projected, a_log, dt_bias, norm_weight, eps)
    return chunk_gated_delta(
        (qkv, qkv, qkv), (keys, 2 * keys), gating, recurrent_state, num_tokens, keys // key_dim
    )


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

    tables = ("causal_conv1d", "gated_delta_prepare", "gated_delta_output", "gated_delta_step")
    scan = "gated_delta_scan_fp32" if dtype == torch.float32 else "gated_delta_scan"
    streams = {"_step_kernel": ("state_ptr",)}
    tables = (*tables, scan)
    return CompileCase(
        f"gated_delta_net/{name}",
        gated_delta_net,
        arguments,
        tables,
        streams=streams,
        early={"_step_kernel": ("state_ptr",)},
    )


def compile_cases() -> list[CompileCase]:
    """The gated delta net of Qwen3.5-35B-A3B, and a small one in fp32."""
    return [
        _compile_case("qwen3_5_35b", torch.bfloat16, 16, 32, 128),
        _compile_case("small_fp32", torch.float32, 2, 4, 64),
    ]


def tune_candidates() -> dict[str, list[dict]]:
    """Configurations worth trying, by table."""
    scan = ((16, 3, 4), (32, 1, 4), (32, 2, 4), (32, 3, 4), (32, 4, 4), (64, 2, 8), (64, 3, 4))
    conv = ((16, 128, 4), (16, 256, 8), (32, 128, 4), (32, 256, 8), (64, 64, 4), (64, 128, 8))
    return {
        "gated_delta_step": [{"num_warps": w} for w in (8, 16, 32)],
        "gated_delta_prepare": [{"num_warps": w, "num_stages": 1} for w in (4, 8)],
        "gated_delta_scan": [{"BLOCK_V": v, "STAGES": s, "num_warps": w} for v, s, w in scan],
        "gated_delta_output": [{"num_warps": w, "num_stages": 1} for w in (4, 8)],
        "causal_conv1d": [{"BLOCK_T": t, "BLOCK_C": c, "num_warps": w} for t, c, w in conv],
    }
