"""The gated delta rule over a whole prompt, in chunks (Yang et al., "Gated Delta Networks", 2024).

With S the state before a chunk, G_i the sum of g over the chunk up to token i, and
A_ij = beta_i exp(G_i - G_j) k_i . k_j for j < i, the corrections v'_i = beta_i (v_i - k_i^T S_i) of
all tokens of a chunk solve a unit lower triangular system:

    T = (I + A)^-1,  u = T (beta v),  w = T (beta exp(G) k),  v' = u - w S
    o = exp(G) q S + (exp(G_i - G_j) q_i . k_j for j <= i) v'
    S <- exp(G_last) S + (exp(G_last - G) k)^T v'

Three launches: `_prepare_kernel` makes u and w of all chunks at once, `_scan_kernel` carries the
state from chunk to chunk, `_output_kernel` makes o of all chunks at once. q and k are never
normalised in memory: their norms are factors of rows and columns. Only differences G_i - G_j <= 0
are exponentiated. Tokens past `num_tokens` have k = v = beta = g = 0, which leaves S alone.
"""

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.causal_conv1d import valid_tokens
from et_moe.backends.cuda.triton.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.dot import dot
from et_moe.backends.cuda.triton.launch import cdiv, launch
from et_moe.backends.cuda.triton.silu import silu
from et_moe.backends.cuda.triton.tuning import tuned

LOG_CHUNK = {2: 6, 4: 5}
"""Base-2 logarithm of the tokens of a chunk, by bytes of an element: fp32 takes more registers."""


@triton.jit
def delta_gates(b, a, a_log, dt_bias):
    """beta = sigmoid(b) and g = -exp(a_log) softplus(a + dt_bias)."""
    x = a + dt_bias
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(1 + e) that keeps a small e (Kahan): the rounding error of u cancels in e / (u - 1).
    exact = u == 1.0
    log1p = tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1.0, u - 1.0)))
    return tl.sigmoid(b), -tl.exp(a_log) * (tl.maximum(x, 0.0) + log1p)


@triton.jit
def _keep_and_add(beta_1, g_1, beta_2, g_2):
    """Sums g and leaves beta alone: a scan's results are computed once, whereas other vectors are
    computed anew for every layout in which they meet a matrix."""
    return beta_2, g_1 + g_2


@triton.jit
def _unit_lower_inverse(a, LOG_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular `a`, doubling the size of inverted blocks.

    inv([[P, 0], [B, Q]]) = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]], for all blocks of a size at once:
    with X the inverse of the block diagonal and B what lies between, X <- X - X B X. Entries of a
    and, the delta rule being a contraction, of X are at most 1, so fp16 operands are as good as
    tf32 and twice as fast.
    """
    row = tl.arange(0, 1 << LOG_SIZE)[:, None]
    column = tl.arange(0, 1 << LOG_SIZE)[None, :]
    x = tl.where(row == column, 1.0, 0.0) - tl.where(row ^ column == 1, a, 0.0)
    a = a.to(DTYPE)
    for level in range(1, LOG_SIZE):  # a loop at run time: unrolled, it takes twice the registers
        # The level at which two indices part is that of the highest bit in which they differ.
        between = tl.where((row >> level) ^ (column >> level) == 1, a, 0.0)
        xb = tl.dot(x.to(DTYPE), between, input_precision="tf32x3")
        x -= tl.dot(xb.to(DTYPE), x.to(DTYPE), input_precision="tf32x3")
    return x


@triton.jit
def _prepare_kernel(
    k_ptr,
    v_ptr,
    b_ptr,
    a_ptr,
    a_log_ptr,
    dt_bias_ptr,
    num_tokens_ptr,
    u_ptr,
    w_ptr,
    decay_ptr,
    k_scale_ptr,
    tokens,
    K_ROW: tl.constexpr,
    K_COLUMN: tl.constexpr,
    V_ROW: tl.constexpr,
    V_COLUMN: tl.constexpr,
    GATE_ROW: tl.constexpr,
    B_COLUMN: tl.constexpr,
    A_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    RAW_GATES: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
):
    """u, w, G and 1 / |k| of one chunk and value head.

    Scratch is head-major: u `[Hv, chunks * CHUNK, Dv]`, w `[Hv, .., Dk]`, G and 1 / |k|
    `fp32 [Hv, ..]`. RAW_GATES: `b` and `a` are yet to become beta and g.
    """
    wait_for_previous()
    CHUNK: tl.constexpr = 1 << LOG_CHUNK
    head = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * CHUNK
    valid = valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS) - start
    if valid <= 0:
        return
    token = tl.arange(0, CHUNK)
    dk = tl.arange(0, DK)
    dv = tl.arange(0, DV)
    is_valid = token < valid
    inside = is_valid[:, None]
    k_column = K_COLUMN + head // GROUP * DK + dk
    k_tile = k_ptr + start * K_ROW + token[:, None] * K_ROW + k_column[None, :]
    k = tl.load(k_tile, mask=inside, other=0.0)
    gate = start * GATE_ROW + token * GATE_ROW + head
    beta = tl.load(b_ptr + gate + B_COLUMN, mask=is_valid, other=0.0).to(tl.float32)
    g = tl.load(a_ptr + gate + A_COLUMN, mask=is_valid, other=0.0).to(tl.float32)
    if RAW_GATES:
        a_log = tl.load(a_log_ptr + head).to(tl.float32)
        beta, g = delta_gates(beta, g, a_log, tl.load(dt_bias_ptr + head).to(tl.float32))
    gate = (tl.where(is_valid, beta, 0.0), tl.where(is_valid, g, 0.0))
    beta, decay = tl.associative_scan(gate, 0, _keep_and_add)
    k32 = k.to(tl.float32)
    k_scale = tl.rsqrt(tl.sum(k32 * k32, 1) + 1e-6)
    row = head * tl.cdiv(tokens, CHUNK).to(tl.int64) * CHUNK + start
    tl.store(decay_ptr + row + token, decay)
    tl.store(k_scale_ptr + row + token, k_scale)

    past = token[:, None] > token[None, :]
    a = dot(k, tl.trans(k), k_ptr) * (beta * k_scale)[:, None] * k_scale[None, :]
    a *= tl.exp(tl.where(past, decay[:, None] - decay[None, :], float("-inf")))
    half: tl.constexpr = tl.float32 if w_ptr.dtype.element_ty == tl.float32 else tl.float16
    t = _unit_lower_inverse(a, LOG_CHUNK, half) * beta[None, :]
    w = dot(t * (tl.exp(decay) * k_scale)[None, :], k, w_ptr)
    tl.store(w_ptr + row * DK + token[:, None] * DK + dk[None, :], w.to(w_ptr.dtype.element_ty))
    v_column = V_COLUMN + head * DV + dv
    v_tile = v_ptr + start * V_ROW + token[:, None] * V_ROW + v_column[None, :]
    v = tl.load(v_tile, mask=inside, other=0.0)
    u = dot(t, v, u_ptr)
    tl.store(u_ptr + row * DV + token[:, None] * DV + dv[None, :], u.to(u_ptr.dtype.element_ty))


@triton.jit
def _scan_kernel(
    k_ptr,
    u_ptr,
    w_ptr,
    decay_ptr,
    k_scale_ptr,
    state_ptr,
    states_ptr,
    num_tokens_ptr,
    tokens,
    K_ROW: tl.constexpr,
    K_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Carries BLOCK_V columns of one head's state through all chunks.

    Writes the state before every chunk, `states [Hv, chunks, Dk, Dv]`, and replaces u by v'.
    """
    wait_for_previous()
    CHUNK: tl.constexpr = 1 << LOG_CHUNK
    head = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    valid = valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS)
    token = tl.arange(0, CHUNK)
    dk = tl.arange(0, DK)
    chunks = tl.cdiv(tokens, CHUNK).to(tl.int64)
    first = head * chunks * CHUNK
    k_tile = k_ptr + (K_COLUMN + head // GROUP * DK) + token[:, None] * K_ROW + dk[None, :]
    w_tile = w_ptr + first * DK + token[:, None] * DK + dk[None, :]
    u_tile = u_ptr + first * DV + token[:, None] * DV + column[None, :]
    in_state = dk[:, None] * DV + column[None, :]
    states_tile = states_ptr + head * chunks * (DK * DV) + in_state
    decay_row = decay_ptr + first
    k_scale_row = k_scale_ptr + first
    state = tl.load(state_ptr + head * (DK * DV) + in_state)
    for start in tl.range(0, valid, CHUNK, num_stages=STAGES):
        k = tl.load(k_tile, mask=(start + token < valid)[:, None], other=0.0)
        w = tl.load(w_tile)
        u = tl.load(u_tile).to(tl.float32)
        decay = tl.load(decay_row + token)
        last = tl.load(decay_row + CHUNK - 1)
        k_scale = tl.load(k_scale_row + token)
        tl.store(states_tile, state.to(states_ptr.dtype.element_ty))
        v = u - dot(w, state, w_ptr)
        tl.store(u_tile, v.to(u_ptr.dtype.element_ty))
        v *= (tl.exp(last - decay) * k_scale)[:, None]
        state = state * tl.exp(last) + dot(tl.trans(k), v, k_ptr)
        k_tile += CHUNK * K_ROW
        w_tile += CHUNK * DK
        u_tile += CHUNK * DV
        states_tile += DK * DV
        decay_row += CHUNK
        k_scale_row += CHUNK
    tl.store(state_ptr + head * (DK * DV) + in_state, state)


@triton.jit
def _output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    k_scale_ptr,
    states_ptr,
    z_ptr,
    norm_weight_ptr,
    num_tokens_ptr,
    out_ptr,
    tokens,
    K_ROW: tl.constexpr,
    K_COLUMN: tl.constexpr,
    Z_ROW: tl.constexpr,
    Z_COLUMN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
):
    """o of one chunk and value head, if GATED RMS-normed and times SiLU(z). Padding becomes 0."""
    wait_for_previous()
    CHUNK: tl.constexpr = 1 << LOG_CHUNK
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    start = chunk * CHUNK
    valid = valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS) - start
    token = tl.arange(0, CHUNK)
    dk = tl.arange(0, DK)
    dv = tl.arange(0, DV)
    out_tile = out_ptr + (start * HEADS + head) * DV + token[:, None] * (HEADS * DV) + dv[None, :]
    in_out = (token < tokens - start)[:, None]
    if valid <= 0:
        tl.store(out_tile, tl.zeros((CHUNK, DV), out_ptr.dtype.element_ty), mask=in_out)
        return
    chunks = tl.cdiv(tokens, CHUNK).to(tl.int64)
    row = (head * chunks + chunk) * CHUNK
    inside = (token < valid)[:, None]
    qk_tile = start * K_ROW + head // GROUP * DK + token[:, None] * K_ROW + dk[None, :]
    q = tl.load(q_ptr + qk_tile, mask=inside, other=0.0)
    k = tl.load(k_ptr + K_COLUMN + qk_tile, mask=inside, other=0.0)
    decay = tl.load(decay_ptr + row + token)
    k_scale = tl.load(k_scale_ptr + row + token)
    q32 = q.to(tl.float32)
    q_scale = tl.rsqrt(tl.sum(q32 * q32, 1) + 1e-6) * DK**-0.5
    seen = token[:, None] >= token[None, :]
    p = dot(q, tl.trans(k), q_ptr) * k_scale[None, :]
    p *= tl.exp(tl.where(seen, decay[:, None] - decay[None, :], float("-inf")))
    # In parts of the columns: fewer registers, hence three programs on an SM instead of two.
    PARTS: tl.constexpr = 2 if DV >= 128 else 1
    parts = ()
    for i in tl.static_range(PARTS):
        column = tl.arange(i * DV // PARTS, (i + 1) * DV // PARTS)[None, :]
        state_tile = (head * chunks + chunk) * (DK * DV) + dk[:, None] * DV + column
        part = dot(q, tl.load(states_ptr + state_tile), q_ptr) * tl.exp(decay)[:, None]
        v = tl.load(v_ptr + row * DV + token[:, None] * DV + column)
        parts += (part + dot(p, v, v_ptr),)
    o = parts[0]
    if PARTS == 2:
        o = tl.join(o, parts[1]).permute(0, 2, 1).reshape(CHUNK, DV)
    o *= q_scale[:, None]
    if GATED:
        z_tile = start * Z_ROW + (Z_COLUMN + head * DV) + token[:, None] * Z_ROW + dv[None, :]
        z = tl.load(z_ptr + z_tile, mask=inside, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + dv).to(tl.float32)
        o *= tl.rsqrt(tl.sum(o * o, 1) / DV + EPS)[:, None] * norm_weight[None, :]
        o *= silu(z)
    o = tl.where(inside, o, 0.0)
    tl.store(out_tile, o.to(out_ptr.dtype.element_ty), mask=in_out)


@dataclasses.dataclass(frozen=True)
class Gating:
    """What the layer adds to the rule: raw gates in, a gated norm behind.

    Attributes:
        projected: `[T, C + V + 2 Hv]`, holds z, b and a from column C on.
        a_log, dt_bias: `[Hv]`. norm_weight: `[Dv]`. eps: of the norm.
    """

    projected: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float


class Gates(NamedTuple):
    """Arguments of the kernels for gates and norm; any tensors where there is no `Gating`."""

    b: torch.Tensor
    a: torch.Tensor
    z: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    gated: bool
    eps: float
    b_column: int
    a_column: int
    z_column: int


def find_gates(
    gates: tuple[torch.Tensor, torch.Tensor] | Gating, channels: int, values: int, heads: int
) -> Gates:
    """Of `gates` as in `chunk_gated_delta`; z, b and a lie behind the `channels`."""
    if isinstance(gates, Gating):
        projected, layer = gates.projected, (gates.a_log, gates.dt_bias, gates.norm_weight)
        z, b = channels, channels + values
        return Gates(projected, projected, projected, *layer, True, gates.eps, b, b + heads, z)
    g, beta = gates
    return Gates(beta, g, g, g, g, g, False, 0.0, 0, 0, 0)


def chunk_gated_delta(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    columns: tuple[int, int],
    gates: tuple[torch.Tensor, torch.Tensor] | Gating,
    state: torch.Tensor,
    num_tokens: torch.Tensor | None,
    key_heads: int,
) -> torch.Tensor:
    """The rule, and with a `Gating` everything behind the convolution: `[T, Hv * Dv]`.

    Args:
        qkv: q, k, v, each with a token per row; may be one tensor thrice.
        columns: where k and v begin in their rows.
        gates: g and beta, `fp32 [T, Hv]`, or where they come from.
        state: `fp32 [Hv, Dk, Dv]`, updated in place.
        num_tokens: `int64 [1]` or None for T.
    """
    (q, k, v), (heads, key_dim, value_dim) = qkv, state.shape
    tokens, values = q.shape[0], heads * value_dim
    log_chunk = LOG_CHUNK[q.element_size()]
    chunks = cdiv(tokens, 1 << log_chunk)
    out = q.new_empty((tokens, values))
    u = q.new_empty((heads, chunks << log_chunk, value_dim))
    w = q.new_empty((heads, chunks << log_chunk, key_dim))
    decay = q.new_empty((heads, chunks << log_chunk), dtype=torch.float32)
    k_scale = torch.empty_like(decay)
    states = q.new_empty((heads, chunks, key_dim, value_dim))
    shape = {
        "K_ROW": k.stride(0),
        "K_COLUMN": columns[0],
        "GROUP": heads // key_heads,
        "DK": key_dim,
        "DV": value_dim,
        "HAS_NUM_TOKENS": num_tokens is not None,
        "LOG_CHUNK": log_chunk,
    }
    num_tokens = state if num_tokens is None else num_tokens
    found = find_gates(gates, columns[1] + values, values, heads)
    rows = {"V_ROW": v.stride(0), "V_COLUMN": columns[1], "GATE_ROW": found.b.stride(0)}
    rows |= {"B_COLUMN": found.b_column, "A_COLUMN": found.a_column, "RAW_GATES": found.gated}
    arguments = (k, v, found.b, found.a, found.a_log, found.dt_bias, num_tokens)
    arguments += (u, w, decay, k_scale, tokens)
    config = tuned("gated_delta_prepare", tokens)
    launch(_prepare_kernel, (chunks, heads), *arguments, **shape, **rows, **config)

    table = "gated_delta_scan" if q.element_size() == 2 else "gated_delta_scan_fp32"
    config = tuned(table, tokens)
    config["BLOCK_V"] = min(config["BLOCK_V"], value_dim)
    grid = (value_dim // config["BLOCK_V"], heads)
    arguments = (k, u, w, decay, k_scale, state, states, num_tokens, tokens)
    launch(_scan_kernel, grid, *arguments, **shape, **config)

    arguments = (q, k, u, decay, k_scale, states, found.z, found.norm_weight, num_tokens)
    arguments += (out, tokens)
    rows = {"Z_ROW": found.z.stride(0), "Z_COLUMN": found.z_column, "HEADS": heads}
    rows |= {"GATED": found.gated, "EPS": found.eps}
    config = tuned("gated_delta_output", tokens)
    launch(_output_kernel, (chunks, heads), *arguments, **shape, **rows, **config)
    return out
