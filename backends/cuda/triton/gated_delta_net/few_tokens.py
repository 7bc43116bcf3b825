"""The gated delta rule of a prompt of 2 to 4 tokens: one after the other, as they are decoded.

Chunks (`chunk.py`) are for many tokens: a chunk's matrices have 64 rows, and take four launches,
whatever is in them.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, load_version
from et_moe.backends.cuda.triton.gated_delta_net.gates import Gating, find_gates
from et_moe.backends.cuda.triton.gated_delta_net.one_token import (
    advance_token,
    finish_token,
    load_layer,
    load_state,
    load_token,
    point_to_state,
)
from et_moe.backends.cuda.triton.gated_delta_net.places import StatePlaces
from et_moe.backends.cuda.triton.gated_delta_net.step import describe_rows
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _few_tokens_kernel(
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
    tokens,
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
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    VERSIONS: tl.constexpr,
):
    """All tokens of one sequence, BLOCK_V columns of a value head; each as in `_step_kernel`, but
    that the state stays in registers in fp32, and only the last is left, as version 0.

    Padding becomes 0. Without a valid row nothing is read through the slot.
    """
    head = tl.program_id(0)
    count = count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS).to(tl.int32)
    slot = tl.load(slots_ptr).to(tl.int64) * VERSIONS
    tile, key, dv = point_to_state(state_ptr, slot, head, HEADS, DK, DV, BLOCK_V, GROUP, WARPS)
    old_tile = tile
    if versions_ptr is not None:
        old_tile += load_version(versions_ptr, VERSIONS) * (HEADS * DK * DV)
    state = load_state(old_tile, key, dv, count > 0)
    layer = load_layer(a_log_ptr, dt_bias_ptr, norm_weight_ptr, head, DV, GATED)
    first = head * DV + tl.program_id(1) * BLOCK_V
    column = first + tl.arange(0, BLOCK_V)
    warp = tl.arange(0, WARPS)[:, None]
    own = warp == tl.arange(0, BLOCK_V)[None, :] // (BLOCK_V // WARPS)
    target = out_ptr + warp * 0 + column[None, :]
    KEEP: tl.constexpr = tl.float32
    wait_for_previous()
    k_ptr += K_COLUMN
    v_ptr += V_COLUMN
    for token in range(count):
        inputs = load_token(
            (q_ptr + token * K_ROW, k_ptr + token * K_ROW, v_ptr + token * V_ROW),
            (b_ptr, a_ptr, z_ptr),
            token,
            key,
            first,
            dv,
            head,
            column,
            GATE_ROW,
            B_COLUMN,
            A_COLUMN,
            Z_COLUMN,
            GATED,
        )
        state, o, z = advance_token(state, inputs, layer, KEEP, DK, GATED)
        o = finish_token(o, z, WARPS, DV, GATED, EPS)
        tl.store(target + token * (HEADS * DV), o.to(out_ptr.dtype.element_ty), mask=own)
    left = state.to(state_ptr.dtype.element_ty)
    tl.store(tile, left.reshape(tile.shape), mask=count > 0)
    zeros = tl.zeros((WARPS, BLOCK_V), out_ptr.dtype.element_ty)
    for token in range(count, tokens):
        tl.store(target + token * (HEADS * DV), zeros, mask=own)


def few_gated_delta(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    columns: tuple[int, int],
    gates: tuple[torch.Tensor, torch.Tensor] | Gating,
    places: StatePlaces,
    key_heads: int,
) -> torch.Tensor:
    """`chunk_gated_delta` of a few tokens, with its arguments and result, in one launch.

    With a state of fp32 the bits are those of as many calls of one token.
    """
    (q, _, _), (heads, key_dim, value_dim) = qkv, places.shape
    values, num_tokens = heads * value_dim, places.num_tokens
    out = q.new_empty((q.shape[0], values))
    found = find_gates(gates, columns[1] + values, values, heads)
    block = value_dim if found.gated else min(value_dim, 32)
    config = find_config("gated_delta_step", state_elements=key_dim * block)
    launch(
        _few_tokens_kernel,
        (heads, value_dim // block),
        *qkv,
        *found[:6],
        places.slots if num_tokens is None else num_tokens,
        *(places.state, places.slots, places.versions, out, q.shape[0]),
        **describe_rows(qkv, columns, found, places, key_heads),
        BLOCK_V=block,
        WARPS=config["num_warps"],
        HAS_NUM_TOKENS=num_tokens is not None,
        VERSIONS=places.count,
        **config,
    )
    return out
