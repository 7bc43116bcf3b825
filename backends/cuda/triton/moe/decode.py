"""A few tokens through experts: two matrix-vector kernels over pairs of a token and a slot.

The bytes of the weights set the time, so every thread block loads all of its weights at once and
prepares the activations while they are on their way. Each thread block quantizes the few
activations anew, which costs less than a launch of its own.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import prefetch, wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.moe.decode_dot import (
    QUADS,
    arange_rows,
    count_row_units,
    dot_steps,
    load_weights,
    place_column,
    point_to_units,
    quantize_steps,
    sum_rows,
)
from et_moe.backends.cuda.triton.moe.layout import count_scales, find_bits, name_tables
from et_moe.backends.cuda.triton.moe.slots import load_slot_weights
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE, expert_activation_tile


@triton.jit
def _decode_gate_up_kernel(
    x,
    w13,
    w13_scale,
    topk_ids,
    w2,
    inner,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    INNER: tl.constexpr,
    W2_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LANES: tl.constexpr,
    PREFETCH: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """silu(gate) * up of one pair, for BLOCK_N (at most 64) of the INNER columns.

    x is `[tokens, K]`, and inner `[pairs, INNER]` with its columns where `place_column` says.
    BLOCK_T tiles of 128 columns are loaded at once. A thread block quantizes x once and brings it
    to its lanes through shared memory. That takes fewer instructions than to quantize it in every
    lane, and its latency is hidden behind the router. PREFETCH, on sm_90 and later, brings the
    W2_BYTES of the expert's w2 into the L2 cache for the next kernel, while memory would be idle.
    Where there are more thread blocks than run at once, most start behind the router: WEIGHTS_FIRST
    asks for the weights before x is quantized.
    """
    TILES: tl.constexpr = (K + 127) // 128
    # If all activations are loaded at once, they are quantized while the router runs.
    EARLY: tl.constexpr = BLOCK_T >= TILES and not WEIGHTS_FIRST
    COPIES: tl.constexpr = LANES if TILE == 0 else 1
    pair = tl.program_id(1)
    step = tl.arange(0, BLOCK_T)
    first = step * 128
    x += pair // SLOTS * K
    if EARLY:
        activations = quantize_steps(x + first, K - first, TILE, COPIES, False)
    wait_for_previous()
    expert = tl.load(topk_ids + pair).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    column = tl.program_id(0) * BLOCK_N
    block = expert * (INNER // 64) + column // 64
    # The rows of the product are BLOCK_N of gate, then BLOCK_N of up.
    i = arange_rows(2 * BLOCK_N, LANES)
    row = i // BLOCK_N * 64 + column % 64 + i % BLOCK_N
    UNITS: tl.constexpr = count_row_units(BITS, TILE)
    units = point_to_units(w13, BITS, TILE) + block * (TILES * 128 * UNITS)
    scales = w13_scale
    if BITS <= 8:
        scales += block * (count_scales(TILES, GROUP, BITS) * 128)
    if PREFETCH:
        SHARE: tl.constexpr = W2_BYTES // (INNER // BLOCK_N)
        next_weights = w2.to(tl.pointer_type(tl.uint8)) + expert * W2_BYTES
        prefetch(next_weights + tl.program_id(0) * SHARE, SHARE)
    acc = tl.zeros((2 * BLOCK_N // LANES, BLOCK_T, LANES, QUADS), tl.float32)
    for start in range(0, TILES, BLOCK_T):
        limit = K - start * 128 - first
        tile = start + step
        weights = load_weights(units, scales, tile, limit > 0, row, 128, TILES, GROUP, BITS, TILE)
        if not EARLY:
            activations = quantize_steps(x + start * 128 + first, limit, TILE, COPIES, False)
        acc += dot_steps(weights, activations, GROUP, BITS, TILE)
    gate, up = sum_rows(acc).reshape(2, BLOCK_N).permute(1, 0).split()
    n = place_column(column + tl.arange(0, BLOCK_N))
    tl.store(inner + pair * INNER + n, (silu(gate) * up).to(inner.dtype.element_ty))


@triton.jit
def _decode_down_kernel(
    inner,
    w2,
    w2_scale,
    topk_weights,
    topk_ids,
    residual,
    out,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_UP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LANES: tl.constexpr,
):
    """The weighted sum over one token's slots, plus residual, for BLOCK_N (at most 64) columns.

    inner is `[pairs, K]` with its columns where `place_column` says. Slots and tiles of 128 columns
    are one dimension, of which BLOCK_T are loaded at once. If these are all, the weights are loaded
    before inner exists.
    """
    TILES: tl.constexpr = K // 128
    AT_ONCE: tl.constexpr = BLOCK_T >= SLOTS * TILES
    if not AT_ONCE:
        wait_for_previous()
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N
    row = column % 64 + arange_rows(BLOCK_N, LANES)
    n = column + tl.arange(0, BLOCK_N)
    target = token * HIDDEN + n
    # The residual is ready, as are the ids and their weights: an earlier kernel than the last wrote
    # them.
    if residual is not None:
        addend = tl.load(residual + target, mask=n < HIDDEN, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N // LANES, BLOCK_T, LANES, QUADS), tl.float32)
    for start in range(0, SLOTS * TILES, BLOCK_T):
        weights, pair, tile, valid = load_slot_weights(
            *(w2, w2_scale, topk_weights, topk_ids, token, start, column, row),
            *(EXPERTS, SLOTS, TILES, HIDDEN_UP, GROUP, BITS, TILE, BLOCK_T),
        )
        if AT_ONCE:
            wait_for_previous()
        limit = tl.where(valid, 128, 0)
        activations = quantize_steps(inner + pair * K + tile * 128, limit, TILE, LANES, True)
        acc += dot_steps(weights, activations, GROUP, BITS, TILE)
    out_row = sum_rows(acc)
    if residual is not None:
        out_row += addend
    tl.store(out + target, out_row.to(out.dtype.element_ty), mask=n < HIDDEN)


def moe_decode(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int | None,
    residual: torch.Tensor | None,
    int8: bool,
) -> torch.Tensor:
    """An op of the experts (`op.py`) on up to `DECODE_TOKENS` tokens: `[T, H]` in x's dtype.

    Args:
        w13_scale, w2_scale: None for float weights; group_size: None for all but INT4.
        int8: whether activations are quantized.
    """
    tokens, hidden = x.shape
    slots = topk_ids.shape[1]
    experts, inner_blocks = w13.shape[:2]
    inner_dim, hidden_up = inner_blocks * 64, w2.shape[1] * 64
    bits, table = find_bits(w13), name_tables(w13, int8)
    topk_ids = topk_ids.contiguous()

    inner = x.new_empty((tokens * slots, inner_dim), dtype=torch.float32 if int8 else x.dtype)
    config = find_config(f"{table}_decode_gate_up", tokens=tokens)
    config["BLOCK_T"] = min(config["BLOCK_T"], triton.next_power_of_2(cdiv(hidden, 128)))
    launch(
        _decode_gate_up_kernel,
        (inner_dim // config["BLOCK_N"], tokens * slots),
        x.contiguous(),
        w13,
        w13_scale,
        topk_ids,
        w2,
        inner,
        EXPERTS=experts,
        SLOTS=slots,
        K=hidden,
        INNER=inner_dim,
        W2_BYTES=hidden_up * inner_dim * bits // 8,
        GROUP=group_size,
        BITS=bits,
        TILE=ACTIVATION_TILE if int8 else 0,
        **config,
    )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = find_config(f"{table}_decode_down", tokens=tokens)
    steps = slots * inner_dim // 128
    config["BLOCK_T"] = min(config["BLOCK_T"], triton.next_power_of_2(steps))
    launch(
        _decode_down_kernel,
        (hidden_up // config["BLOCK_N"], tokens),
        inner,
        w2,
        w2_scale,
        topk_weights.contiguous(),
        topk_ids,
        None if residual is None else residual.contiguous(),
        out,
        EXPERTS=experts,
        SLOTS=slots,
        K=inner_dim,
        HIDDEN=hidden,
        HIDDEN_UP=hidden_up,
        GROUP=group_size,
        BITS=bits,
        TILE=expert_activation_tile(inner_dim) if int8 else 0,
        **config,
    )
    return out
