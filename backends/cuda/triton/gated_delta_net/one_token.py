"""One token of the gated delta rule, in registers: for one token in a kernel, and for a few."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.gated_delta_net.gates import compute_gates


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
    slot,
    head,
    HEADS: tl.constexpr,
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
        state_ptr: pointer to states `[HEADS, DK, DV]`; slot: which of them, int64.

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
    tile = state_ptr + (slot * HEADS + head) * (DK * DV) + tl.program_id(1) * BLOCK_V
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
    GATED: tl.constexpr,
):
    """One token of the rule, as `_step_kernel` (`step.py`) says it.

    Args:
        state: fp32, in the dimensions that `load_state` gives it.
        inputs: as from `load_token`; layer: as from `load_layer`.
        KEEP: the dtype in which the state is kept behind the token.

    Returns:
        The state as it is kept, and o and z for `finish_token`.
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
    return state.to(KEEP), o, z


@triton.jit
def finish_token(
    o, z, WARPS: tl.constexpr, DV: tl.constexpr, GATED: tl.constexpr, EPS: tl.constexpr
):
    """o and z as from `advance_token`, to o with the layer's norm and gate, `[WARPS, BLOCK_V]`, of
    which each row is a copy.

    It follows the store of the state, which takes longer.
    """
    o = _copy_to_every_warp(o, WARPS)
    if GATED:
        # Two threads that add each other's product would each fuse their own multiplication
        # with the addition, and their sums would differ in the last bit. Adding 0 takes up the
        # fusion.
        o *= tl.rsqrt(tl.sum(o * o + 0.0, 1, keep_dims=True) / DV + EPS) * z[None, :]
    return o
