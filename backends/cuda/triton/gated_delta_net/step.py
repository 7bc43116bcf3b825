"""The gated delta rule of one token of a sequence, or of a few, and what its layer does before and
behind it."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.cuda.triton.common.quantized_rows import (
    QuantizedRows,
    RowFormat,
    allocate_rows,
    quantize_tile,
)
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, load_version
from et_moe.backends.cuda.triton.gated_delta_net.gates import Gating, compute_gates, find_gates
from et_moe.backends.cuda.triton.gated_delta_net.places import StatePlaces
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def _add_2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _keep_first(a, b):
    return a


@triton.jit
def _copy_to_every_warp(x, WARPS: tl.constexpr):
    """Gives every warp all of x: `[WARPS, numel]`, each row a copy.

    What follows then needs no other warp. A scan over single elements, which computes nothing, has
    the compiler's own layout for its shape, with one row per warp. Other operations would keep the
    layout of x.
    """
    rows = tl.broadcast_to(x.reshape(1, 1, x.numel), (WARPS, 1, x.numel))
    return tl.associative_scan(rows, 1, _keep_first).reshape(WARPS, x.numel)


@triton.jit
def point_to_state(
    state_ptr,
    head,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Where a program finds its part of a state, and of q, k and v.

    Latency is what counts here, so threads exchange as little as possible. A warp has some columns
    of the state to itself, and sums over their rows in registers first, then over lanes. Every warp
    loads all of q and k and computes their norms. Only the norm of o crosses warps.

    Args:
        state_ptr: pointer to `[HEADS, DK, DV]`.

    Returns:
        Pointers to the state; key `[ROWS, K_LANES]`, which elements of q and k; and dv
        `[WARPS, V_LANES, VECTOR]`, which of the BLOCK_V columns.
    """
    COLUMNS: tl.constexpr = BLOCK_V // WARPS
    BITS: tl.constexpr = state_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = min(128 // BITS, COLUMNS)  # columns per thread: a load of 16 bytes
    V_LANES: tl.constexpr = COLUMNS // VECTOR
    K_LANES: tl.constexpr = min(max(32 // V_LANES, 1), DK // 2)
    ROWS: tl.constexpr = DK // K_LANES  # per thread
    dk = tl.arange(0, K_LANES)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    dv = tl.arange(0, WARPS)[:, None] * V_LANES + tl.arange(0, V_LANES)[None, :]
    dv = dv[:, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    # The compiler spreads a tile over lanes, then warps, then registers, with the last dimension
    # first. Rows are loaded in the order that brings each to its thread.
    row = tl.arange(0, WARPS * DK)
    lane, warp = row % K_LANES, row // K_LANES % WARPS
    row = lane * ROWS + row // (K_LANES * WARPS)
    tile = state_ptr + head * (DK * DV) + tl.program_id(1) * BLOCK_V
    tile += (row * DV + warp * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    return tile, head // GROUP * DK + dk, dv


@triton.jit
def load_state(tile, key, dv, valid):
    """The state that `point_to_state` points to, fp32 `[ROWS, WARPS, K_LANES, V_LANES, VECTOR]`;
    zeros unless valid."""
    state = tl.load(tile, mask=valid, other=0.0).to(tl.float32)
    return state.reshape(key.shape[0], dv.shape[0], key.shape[1], dv.shape[1], dv.shape[2])


@triton.jit
def load_layer(
    a_log_ptr, dt_bias_ptr, norm_weight_ptr, head, DV: tl.constexpr, GATED: tl.constexpr
):
    """The head's a_log and dt_bias and the norm's weight, fp32; zeros without GATED."""
    a_log, dt_bias, norm_weight = 0.0, 0.0, 0.0
    if GATED:
        a_log = tl.load(a_log_ptr + head).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + tl.arange(0, DV)).to(tl.float32)
    return a_log, dt_bias, norm_weight


@triton.jit
def load_token(
    qkv,
    gates,
    sequence,
    key,
    first,
    dv,
    head,
    column,
    STRIDE: tl.constexpr,
    B_COLUMN: tl.constexpr,
    A_COLUMN: tl.constexpr,
    Z_COLUMN: tl.constexpr,
    GATED: tl.constexpr,
):
    """A token's q, k, v, b, a and, with GATED, z, all fp32; q and k have the dimensions of a state.

    Args:
        qkv: pointers to its q, k and v; key and first + dv: which elements of them.
        gates: pointers to b, a and z, of whose rows each sequence has STRIDE elements; the columns
            are counted from there.
        column: which elements of z.
    """
    q_ptr, k_ptr, v_ptr = qkv
    b_ptr, a_ptr, z_ptr = gates
    q = tl.load(q_ptr + key).to(tl.float32)[:, None, :, None, None]
    k = tl.load(k_ptr + key).to(tl.float32)[:, None, :, None, None]
    v = tl.load(v_ptr + first + dv).to(tl.float32)
    b = tl.load(b_ptr + sequence * STRIDE + B_COLUMN + head).to(tl.float32)
    a = tl.load(a_ptr + sequence * STRIDE + A_COLUMN + head).to(tl.float32)
    z = 0.0
    if GATED:
        z_ptr += sequence * STRIDE + Z_COLUMN
        z = tl.load(z_ptr + column).to(tl.float32)
    return q, k, v, b, a, z


@triton.jit
def advance_token(
    state,
    inputs,
    layer,
    KEEP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
):
    """One token of `_step_kernel`.

    Args:
        state: fp32, in the dimensions that `load_state` gives it.
        inputs: as from `load_token`; layer: as from `load_layer`.
        KEEP: the dtype in which the state is kept behind the token.

    Returns:
        The state as it is kept, and o, `[WARPS, BLOCK_V]`, of which each row is a copy.
    """
    ROWS: tl.constexpr = state.shape[0]
    WARPS: tl.constexpr = state.shape[1]
    K_LANES: tl.constexpr = state.shape[2]
    V_LANES: tl.constexpr = state.shape[3]
    q, k, v, b, a, z = inputs
    a_log, dt_bias, norm_weight = layer
    if GATED:
        z = norm_weight * silu(z)
        b, a = compute_gates(b, a, a_log, dt_bias)
    decay = tl.exp(a)

    # Sums are over registers first, then over lanes. q and k get the dimensions of the state
    # that they lack, so that they are spread as it is, and their sums are where its sums are.
    q_lane = tl.broadcast_to(q, (ROWS, WARPS, K_LANES, V_LANES, 1))
    k_lane = tl.broadcast_to(k, (ROWS, WARPS, K_LANES, V_LANES, 1))
    squares = tl.reduce((q_lane * q_lane, k_lane * k_lane, q_lane * k_lane), 0, _add_3)
    qq, kk, qk_product = tl.reduce(squares, 1, _add_3)
    k_state, q_state = tl.reduce(tl.reduce((state * k, state * q), 0, _add_2), 1, _add_2)
    q_scale = tl.rsqrt(qq + 1e-6) * DK**-0.5
    k_scale = tl.rsqrt(kk + 1e-6)
    delta = b * (v - decay * k_scale * k_state)
    o = q_scale * (decay * q_state + k_scale * qk_product * delta)
    state = state * decay + k * (k_scale * delta)[None, :, None, :, :]
    left = state.to(KEEP)
    o = _copy_to_every_warp(o, WARPS)
    if GATED:
        # Two threads that add each other's product would each fuse their own multiplication
        # with the addition, and their sums would differ in the last bit. Adding 0 takes up the
        # fusion.
        o *= tl.rsqrt(tl.sum(o * o + 0.0, 1, keep_dims=True) / DV + EPS) * z[None, :]
    return left, o


@triton.jit
def _step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    b_ptr,
    a_ptr,
    z_ptr,
    a_log_ptr,
    dt_bias_ptr,
    norm_weight_ptr,
    num_tokens_ptr,
    state_ptr,
    slots_ptr,
    versions_ptr,
    out_ptr,
    scale_ptr,
    K_ROW: tl.constexpr,
    K_COLUMN: tl.constexpr,
    V_ROW: tl.constexpr,
    V_COLUMN: tl.constexpr,
    GATE_ROW: tl.constexpr,
    Z_COLUMN: tl.constexpr,
    B_COLUMN: tl.constexpr,
    A_COLUMN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WARPS: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    VERSIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_M: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
):
    """TOKENS tokens of a sequence, BLOCK_V columns of a value head. With q and k scaled to unit
    length, of each:

        delta = beta (v - exp(g) k^T S)
        o = exp(g) q^T S + (q . k) delta
        S <- exp(g) S + k delta^T

    With GATED, b and a are yet to become beta and g, o is RMS-normed and multiplied by SiLU(z), and
    BLOCK_V must be the whole head. A sequence without a valid row gets zeros, and nothing is read
    through its slot. The state stays in registers from token to token, and each leaves a version,
    from which the next goes on: rounded, if states are bf16.

    With scale_ptr o is quantized: out_ptr and it are the `QuantizedRows`, of PADDED_M rows.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(2).to(tl.int64)
    count = count_valid_tokens(num_tokens_ptr + sequence, TOKENS, HAS_NUM_TOKENS)
    valid = count > 0
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if versions_ptr is not None:
        slot *= VERSIONS
    state_ptr += slot * (HEADS * DK * DV)
    state_tile, key, dv = point_to_state(state_ptr, head, DK, DV, BLOCK_V, GROUP, WARPS)
    old_tile = state_tile
    if versions_ptr is not None:
        old_tile += load_version(versions_ptr + sequence, VERSIONS) * (HEADS * DK * DV)
    state = load_state(old_tile, key, dv, valid)
    layer = load_layer(a_log_ptr, dt_bias_ptr, norm_weight_ptr, head, DV, GATED)
    first = head * DV + tl.program_id(1) * BLOCK_V
    column = first + tl.arange(0, BLOCK_V)
    wait_for_previous()
    q_ptr += sequence * (TOKENS * K_ROW)
    k_ptr += sequence * (TOKENS * K_ROW) + K_COLUMN
    v_ptr += sequence * (TOKENS * V_ROW) + V_COLUMN
    gates = (b_ptr, a_ptr, z_ptr)
    STRIDE: tl.constexpr = TOKENS * GATE_ROW
    KEEP: tl.constexpr = state_ptr.dtype.element_ty
    inputs = load_token(
        (q_ptr, k_ptr, v_ptr),
        gates,
        sequence,
        key,
        first,
        dv,
        head,
        column,
        STRIDE,
        B_COLUMN,
        A_COLUMN,
        Z_COLUMN,
        GATED,
    )
    for token in tl.static_range(TOKENS):
        now = inputs
        if token + 1 < TOKENS:  # on their way while this token is computed
            q_ptr += K_ROW
            k_ptr += K_ROW
            v_ptr += V_ROW
            inputs = load_token(
                (q_ptr, k_ptr, v_ptr),
                gates,
                sequence,
                key,
                first,
                dv,
                head,
                column,
                STRIDE,
                B_COLUMN + (token + 1) * GATE_ROW,
                A_COLUMN + (token + 1) * GATE_ROW,
                Z_COLUMN + (token + 1) * GATE_ROW,
                GATED,
            )
        left, o = advance_token(state, now, layer, KEEP, DK, DV, GATED, EPS)
        tl.store(state_tile, left.reshape(state_tile.shape), mask=valid)
        state = left.to(tl.float32)
        warp = tl.arange(0, WARPS)[:, None]
        if HAS_NUM_TOKENS:
            o = tl.where(valid, o, 0.0)
        out_ptr += sequence * (TOKENS * HEADS * DV) if token == 0 else HEADS * DV
        target = out_ptr + warp * 0 + column[None, :]
        mask = warp == tl.arange(0, BLOCK_V)[None, :] // (BLOCK_V // WARPS)
        if scale_ptr is not None:
            o, scale = quantize_tile(o, q_ptr.dtype.element_ty)
            at = head * PADDED_M + sequence * TOKENS + token
            own = tl.arange(0, WARPS) == 0
            tl.store(scale_ptr + at + tl.zeros_like(own), scale * SCALE_FACTOR, mask=own)
        tl.store(target, o.to(out_ptr.dtype.element_ty), mask=mask)
        if token + 1 < TOKENS:
            state_tile += HEADS * DK * DV
            valid = count > token + 1


def step_gated_delta(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    columns: tuple[int, int],
    gates: tuple[torch.Tensor, torch.Tensor] | Gating,
    places: StatePlaces,
    key_heads: int,
    tokens: int,
    wanted: RowFormat | None = None,
) -> torch.Tensor | QuantizedRows:
    """`chunk_gated_delta` of `tokens` tokens of each of B sequences, in one launch; each token
    leaves a version.

    All else has B times `tokens` rows.

    Args:
        wanted: how the linear layer behind it wants rows, if it takes them quantized. They are if
            there is a `Gating` and Dv is `ACTIVATION_TILE`.

    Returns:
        `[B * tokens, Hv * Dv]` in the dtype of q, or these rows quantized.
    """
    (q, k, v), (heads, key_dim, value_dim) = qkv, places.shape
    values, slots, num_tokens = heads * value_dim, places.slots, places.num_tokens
    found = find_gates(gates, columns[1] + values, values, heads)
    if not found.gated or value_dim != ACTIVATION_TILE:
        wanted = None
    result = allocate_rows(q, q.shape[0], values, wanted)
    block = value_dim if found.gated else min(value_dim, 32)
    config = find_config("gated_delta_step", state_elements=key_dim * block)
    launch(
        _step_kernel,
        (heads, value_dim // block, slots.shape[0]),
        q,
        k,
        v,
        *found[:6],
        slots if num_tokens is None else num_tokens,
        places.state,
        slots,
        places.versions,
        *result.pointers,
        K_ROW=k.stride(0),
        K_COLUMN=columns[0],
        V_ROW=v.stride(0),
        V_COLUMN=columns[1],
        GATE_ROW=found.b.stride(0),
        Z_COLUMN=found.z_column,
        B_COLUMN=found.b_column,
        A_COLUMN=found.a_column,
        HEADS=heads,
        GROUP=heads // key_heads,
        DK=key_dim,
        DV=value_dim,
        BLOCK_V=block,
        WARPS=config["num_warps"],
        GATED=found.gated,
        EPS=found.eps,
        HAS_NUM_TOKENS=num_tokens is not None,
        VERSIONS=places.count,
        TOKENS=tokens,
        **result.shape,
        **config,
    )
    return result.out
