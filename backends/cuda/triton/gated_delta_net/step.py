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
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, load_version
from et_moe.backends.cuda.triton.gated_delta_net.gates import Gates, Gating, find_gates
from et_moe.backends.cuda.triton.gated_delta_net.one_token import (
    advance_token,
    finish_token,
    load_layer,
    load_state,
    load_token,
    point_to_state,
)
from et_moe.backends.cuda.triton.gated_delta_net.places import StatePlaces
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


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
    state_tile, key, dv = point_to_state(
        state_ptr, slot, head, HEADS, DK, DV, BLOCK_V, GROUP, WARPS
    )
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
        left, o, z = advance_token(state, now, layer, KEEP, DK, GATED)
        tl.store(state_tile, left.reshape(state_tile.shape), mask=valid)
        state = left.to(tl.float32)
        o = finish_token(o, z, WARPS, DV, GATED, EPS)
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


def describe_rows(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    columns: tuple[int, int],
    found: Gates,
    places: StatePlaces,
    key_heads: int,
) -> dict:
    """The constexprs of `_step_kernel` from K_ROW to DV, with GATED and EPS, for arguments as of
    `step_gated_delta`."""
    (_, k, v), (heads, key_dim, value_dim) = qkv, places.shape
    return {
        "K_ROW": k.stride(0),
        "K_COLUMN": columns[0],
        "V_ROW": v.stride(0),
        "V_COLUMN": columns[1],
        "GATE_ROW": found.b.stride(0),
        "Z_COLUMN": found.z_column,
        "B_COLUMN": found.b_column,
        "A_COLUMN": found.a_column,
        "HEADS": heads,
        "GROUP": heads // key_heads,
        "DK": key_dim,
        "DV": value_dim,
        "GATED": found.gated,
        "EPS": found.eps,
    }


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
        **describe_rows(qkv, columns, found, places, key_heads),
        BLOCK_V=block,
        WARPS=config["num_warps"],
        HAS_NUM_TOKENS=num_tokens is not None,
        VERSIONS=places.count,
        TOKENS=tokens,
        **result.shape,
        **config,
    )
    return result.out
