"""5 to 16 tokens through experts with INT8 activations: matrix-vector kernels over pairs of a token
and a slot, as in `decode.py`, whose activations are quantized ahead.

Of one token every thread block quantizes the few activations anew, while it waits for the router.
Of more tokens there are more thread blocks than run at once, and each spends as many instructions
on that as on its weights. Two launches that quantize once cost less (docs/performance.md).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.moe.decode_dot import (
    QUADS,
    arange_rows,
    count_row_units,
    dot_steps,
    load_quantized,
    load_weights,
    point_to_units,
    sum_rows,
)
from et_moe.backends.cuda.triton.moe.layout import count_scales, find_bits, name_tables
from et_moe.backends.cuda.triton.moe.slots import load_slot_weights
from et_moe.backends.cuda.triton.quantization.op import quantize_hidden, quantize_int8
from et_moe.backends.cuda.triton.tuning import find_config, find_largest
from et_moe.backends.ops import ACTIVATION_TILE, expert_activation_tile


@triton.jit
def _few_gate_up_kernel(
    q,
    q_scale,
    w13,
    w13_scale,
    topk_ids,
    inner,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LANES: tl.constexpr,
):
    """silu(gate) * up of one pair, for BLOCK_N (at most 64) of the INNER columns.

    q is `int8 [tokens, K]`, q_scale `float32 [tokens, K / TILE]`, and inner `[pairs, INNER]`.
    BLOCK_T tiles of 128 columns are loaded at once.
    """
    TILES: tl.constexpr = K // 128
    pair = tl.program_id(1)
    token = pair // SLOTS
    words = q.to(tl.pointer_type(tl.int32)) + token * (K // 4)
    scales = q_scale + token * (K // TILE)
    wait_for_previous()
    expert = tl.load(topk_ids + pair).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    column = tl.program_id(0) * BLOCK_N
    block = expert * (INNER // 64) + column // 64
    # The rows of the product are BLOCK_N of gate, then BLOCK_N of up.
    i = arange_rows(2 * BLOCK_N, LANES)
    row = i // BLOCK_N * 64 + column % 64 + i % BLOCK_N
    units = point_to_units(w13, BITS, TILE)
    units += block * (TILES * 128 * count_row_units(BITS, TILE))
    w13_scale += block * (count_scales(TILES, GROUP, BITS) * 128)
    acc = tl.zeros((2 * BLOCK_N // LANES, BLOCK_T, LANES, QUADS), tl.float32)
    for start in range(0, TILES, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        valid = tile < TILES
        weights = load_weights(units, w13_scale, tile, valid, row, 128, TILES, GROUP, BITS, TILE)
        tile_scales = scales + tile * (128 // TILE)
        activations = load_quantized(words + tile * 32, tile_scales, valid, TILE, LANES)
        acc += dot_steps(weights, activations, GROUP, BITS, TILE)
    gate, up = sum_rows(acc).reshape(2, BLOCK_N).permute(1, 0).split()
    n = column + tl.arange(0, BLOCK_N)
    tl.store(inner + pair * INNER + n, silu(gate) * up)


@triton.jit
def _few_down_kernel(
    q,
    q_scale,
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

    q is `int8 [pairs, K]`, q_scale `float32 [pairs, K / TILE]`. Slots and tiles of 128 columns are
    one dimension, of which BLOCK_T are loaded at once.
    """
    TILES: tl.constexpr = K // 128
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N
    row = column % 64 + arange_rows(BLOCK_N, LANES)
    words = q.to(tl.pointer_type(tl.int32))
    n = column + tl.arange(0, BLOCK_N)
    target = token * HIDDEN + n
    wait_for_previous()
    if residual is not None:
        addend = tl.load(residual + target, mask=n < HIDDEN, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N // LANES, BLOCK_T, LANES, QUADS), tl.float32)
    for start in range(0, SLOTS * TILES, BLOCK_T):
        weights, pair, tile, valid = load_slot_weights(
            *(w2, w2_scale, topk_weights, topk_ids, token, start, column, row),
            *(EXPERTS, SLOTS, TILES, HIDDEN_UP, GROUP, BITS, TILE, BLOCK_T),
        )
        first = pair * K + tile * 128
        activations = load_quantized(
            words + first // 4, q_scale + first // TILE, valid, TILE, LANES
        )
        acc += dot_steps(weights, activations, GROUP, BITS, TILE)
    out_row = sum_rows(acc)
    if residual is not None:
        out_row += addend
    tl.store(out + target, out_row.to(out.dtype.element_ty), mask=n < HIDDEN)


def supports_few_tokens(x: torch.Tensor, int8: bool) -> bool:
    """Whether `moe_few_tokens` shall take x `[T, K]`, of at most `DECODE_TOKENS` rows.

    Of up to `LINEAR_ROWS` rows each has the bits that it has alone, by the kernels for one.
    """
    return int8 and find_largest(x.shape[0]) > LINEAR_ROWS and x.shape[1] % 128 == 0


def moe_few_tokens(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """An op of experts with INT4 or INT8 weights and INT8 activations (`op.py`), for which
    `supports_few_tokens`, with the arguments and result of `moe_decode`."""
    tokens, hidden = x.shape
    slots = topk_ids.shape[1]
    experts, inner_blocks = w13.shape[:2]
    inner_dim, hidden_up = inner_blocks * 64, w2.shape[1] * 64
    table, inner_tile = name_tables(w13, True), expert_activation_tile(inner_dim)
    shape = {"EXPERTS": experts, "SLOTS": slots, "GROUP": group_size, "BITS": find_bits(w13)}
    topk_ids = topk_ids.contiguous()

    q, scale = quantize_int8(x.contiguous(), ACTIVATION_TILE)
    inner = x.new_empty((tokens * slots, inner_dim), dtype=torch.float32)
    config = find_config(f"{table}_few_gate_up", tokens=tokens)
    config["BLOCK_T"] = min(config["BLOCK_T"], triton.next_power_of_2(hidden // 128))
    launch(
        _few_gate_up_kernel,
        (inner_dim // config["BLOCK_N"], tokens * slots),
        *(q, scale, w13, w13_scale, topk_ids, inner),
        **shape,
        K=hidden,
        INNER=inner_dim,
        TILE=ACTIVATION_TILE,
        **config,
    )
    q, scale = quantize_hidden(inner, inner_tile)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = find_config(f"{table}_few_down", tokens=tokens)
    config["BLOCK_T"] = min(config["BLOCK_T"], triton.next_power_of_2(slots * inner_dim // 128))
    launch(
        _few_down_kernel,
        (hidden_up // config["BLOCK_N"], tokens),
        *(q, scale, w2, w2_scale, topk_weights.contiguous(), topk_ids),
        None if residual is None else residual.contiguous(),
        out,
        **shape,
        K=inner_dim,
        HIDDEN=hidden,
        HIDDEN_UP=hidden_up,
        TILE=inner_tile,
        **config,
    )
    return out
