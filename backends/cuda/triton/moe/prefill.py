"""Many tokens through experts: a routing sort, two grouped GEMMs, and a sum over slots.

The GEMMs compute transposed products. Weights are the left operand: they go from memory through
registers, where INT4 is unpacked, into the matrix unit, and never back to shared memory.
Activations are the right operand and stay in shared memory as they are.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.moe.grouped_step import (
    add_grouped_step,
    count_steps,
    scale_rows,
)
from et_moe.backends.cuda.triton.moe.layout import count_scales, find_bits, name_tables
from et_moe.backends.cuda.triton.moe.routing import route, sum_slots
from et_moe.backends.cuda.triton.quantization.op import quantize_int8
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE, expert_activation_tile


@triton.jit
def _gate_up_kernel(
    x,
    x_scale,
    w13,
    w13_scale,
    rows,
    block_experts,
    inner,
    inner_scale,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    INNER_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """silu(gate) * up of a block of pairs, for 64 of the INNER columns.

    x is `[tokens, K]`, x_scale `[tokens, ceil(K / TILE)]`. inner is `[blocks * BLOCK_M, INNER]`:
    int8 with scales inner_scale `[blocks, INNER / INNER_TILE, BLOCK_M]`, or if TILE is 0 of x's
    dtype and without scales. rows and block_experts are as from `route`.
    """
    wait_for_previous()
    TILES: tl.constexpr = (K + 127) // 128
    STEPS: tl.constexpr = count_steps(K, GROUP, TILE, BITS)
    PARTS: tl.constexpr = INNER // 64
    block = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(rows + row)
    used = pair >= 0
    token = tl.maximum(pair, 0) // SLOTS

    x_rows = x + token.to(tl.int64) * K
    x_scale_rows = token if TILE == 0 else x_scale + token * TILES
    # The rows of the product are 64 of gate, then 64 of up.
    row_block = expert * PARTS + part
    WIDTH: tl.constexpr = 64 if BITS == 4 else 128
    weight_rows = w13 + row_block * (TILES * 128 * WIDTH) + tl.arange(0, 128) * WIDTH
    pairs, odd = None, None
    if BITS == 4:
        pairs = w13_scale.to(tl.pointer_type(tl.int32)) + tl.arange(0, 128) // 2
        pairs += row_block * (TILES * (128 // GROUP) * 64)
        odd = tl.arange(0, 128) % 2 == 1
    acc = tl.zeros((128, BLOCK_M), tl.float32)
    # The number of stages stands here, not at the launch, so that small loads are pipelined, too.
    for step in tl.range(STEPS, num_stages=STAGES):
        acc = add_grouped_step(
            acc,
            step,
            x_rows,
            used,
            x_scale_rows,
            weight_rows,
            w13_scale,
            pairs,
            odd,
            *(K, 1, 128, GROUP, BITS, TILE),
        )
    if BITS == 8:
        acc = scale_rows(acc, w13_scale + row_block * 128 + tl.arange(0, 128))
    gate, up = acc.reshape(2, 64, BLOCK_M).permute(1, 2, 0).split()
    activated = silu(gate) * up
    column = part * 64 + tl.arange(0, 64)
    target = inner + row[:, None] * INNER + column[None, :]
    if TILE == 0:
        result = activated.to(inner.dtype.element_ty).trans()
        tl.store(target, result, mask=used[:, None])
    else:
        BLOCK_TILES: tl.constexpr = 64 // INNER_TILE
        tiles = activated.reshape(BLOCK_TILES, INNER_TILE, BLOCK_M)
        inverse, scale = compute_int8_scale(tl.max(tl.abs(tiles), axis=1), EXACT=False)
        q = round_to_int8(tiles * inverse[:, None, :]).to(tl.int8).reshape(64, BLOCK_M)
        tl.store(target, q.trans(), mask=used[:, None])
        tile = (block * PARTS + part) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
        m = tl.arange(0, BLOCK_M)
        tl.store(inner_scale + tile[:, None] * BLOCK_M + m[None, :], scale)


@triton.jit
def _choose_unit(bound):
    """A power of two u with bound < 2^15 u for each bound, and 1 / u; all fp32 of one shape.

    Numbers up to the bound fit fp16 when they are divided by u, and those down to 2^-29 of the
    bound keep all 11 bits of fp16. For a bound of NaN or infinity u is the largest.
    """
    bits = bound.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.minimum(tl.maximum(bits, 15 << 23), 254 << 23) - (14 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _bound_parts(
    x_scale_rows,
    x_used,
    scales,
    weight,
    K: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """A bound, fp32 `[BLOCK_M]`, of the magnitudes of each row's results.

    Args:
        x_scale_rows, x_used, BITS, TILE: as `add_grouped_step` takes them.
        scales: pointer to the SCALES weight scales of the columns that the program computes.
        weight: fp32 `[BLOCK_M]`, the routing weights.
    """
    tile = tl.arange(0, triton.next_power_of_2(K // TILE))
    inside = x_used[None, :] & (tile < K // TILE)[:, None]
    at = x_scale_rows[None, :] + tile[:, None] * X_SCALE_STRIDE
    x_scale = tl.max(tl.load(at, mask=inside, other=0.0), axis=0)
    i = tl.arange(0, triton.next_power_of_2(SCALES))
    weight_scale = tl.load(scales + i, mask=i < SCALES, other=0.0).to(tl.float32)
    # An activation is at most 127 times its scale, a weight 8 or 128 times its own.
    LARGEST: tl.constexpr = 8.0 if BITS == 4 else 128.0
    largest = x_scale * tl.max(tl.abs(weight_scale), axis=0) * (127.0 * LARGEST * K)
    return largest * tl.abs(weight)


@triton.jit
def _down_kernel(
    inner,
    inner_scale,
    w2,
    w2_scale,
    topk_weights,
    rows,
    block_experts,
    out,
    unit,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_UP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The routing weight times w2 of the expert times inner: each pair's row of out.

    A program computes REPEAT times BLOCK_N columns. K is short, and to fill the pipeline anew for
    every block of columns would cost as much as its products.

    out is `[pairs, HIDDEN]`: float32, or with unit and a TILE float16, to be multiplied by unit.
    unit is float32 `[pairs, PARTS]`, a power of two for each of the PARTS programs that share a
    row. (Rounding to bf16 instead would add as much error as that of the sum.)
    """
    wait_for_previous()
    TILES: tl.constexpr = K // 128
    STEPS: tl.constexpr = count_steps(K, GROUP, TILE, BITS)
    PARTS: tl.constexpr = HIDDEN_UP // (BLOCK_N * REPEAT)
    block = tl.program_id(0) // PARTS
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    m = tl.arange(0, BLOCK_M)
    row = block.to(tl.int64) * BLOCK_M + m
    pair = tl.load(rows + row).to(tl.int64)
    used = pair >= 0
    weight = tl.load(topk_weights + pair, mask=used, other=0.0).to(tl.float32)
    x_rows = inner + row * K
    x_scale_rows = m if TILE == 0 else inner_scale + block * (K // TILE * BLOCK_M) + m
    part = tl.program_id(0) % PARTS
    n = part * (BLOCK_N * REPEAT) + tl.arange(0, BLOCK_N)
    SCALES: tl.constexpr = count_scales(TILES, GROUP, BITS)  # per column of out
    WIDTH: tl.constexpr = 64 if BITS == 4 else 128
    weight_rows = w2 + (expert * HIDDEN_UP + n) // 64 * (TILES * 64 * WIDTH) + n % 64 * WIDTH
    part_scales = w2_scale
    if SCALES > 0:
        part_scales += (expert * PARTS + part) * (BLOCK_N * REPEAT * SCALES)
    if unit is not None:
        COUNT: tl.constexpr = BLOCK_N * REPEAT * SCALES
        largest = _bound_parts(
            x_scale_rows, used, part_scales, weight, K, BLOCK_M, BITS, TILE, COUNT
        )
        row_unit, inverse = _choose_unit(largest)
        tl.store(unit + pair * PARTS + part, row_unit, mask=used)
        weight *= inverse
    i = tl.arange(0, BLOCK_N)
    pairs, odd = None, None
    if BITS == 4:
        pairs = part_scales.to(tl.pointer_type(tl.int32)) + (i // 64 * (SCALES * 32) + i % 64 // 2)
        odd = i % 2 == 1
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # There is one loop over blocks and steps, so that loads run ahead from block to block.
    for i in tl.range(REPEAT * STEPS, num_stages=STAGES):
        step, weights = i % STEPS, weight_rows + i // STEPS * (BLOCK_N * TILES * WIDTH)
        block_pairs = pairs
        if BITS == 4:
            block_pairs += i // STEPS * (BLOCK_N * SCALES // 2)
        acc = add_grouped_step(
            acc,
            step,
            x_rows,
            used,
            x_scale_rows,
            weights,
            w2_scale,
            block_pairs,
            odd,
            *(K, BLOCK_M, 64, GROUP, BITS, TILE),
        )
        if step == STEPS - 1:
            column = n + i // STEPS * BLOCK_N
            if BITS == 8:
                acc = scale_rows(acc, w2_scale + expert * HIDDEN_UP + column)
            mask = used[:, None] & (column < HIDDEN)[None, :]
            target = out + pair[:, None] * HIDDEN + column[None, :]
            result = (acc * weight[None, :]).to(out.dtype.element_ty)
            tl.store(target, result.trans(), mask=mask)
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)


def _find_divisor(size: int, block: int) -> int:
    """The largest of block, block / 2, block / 4, ... that divides size."""
    while size % block:
        block //= 2
    return block


def moe_prefill(
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
    """An op of the experts (`op.py`) on any number of tokens, with the arguments and result of
    `moe_decode`."""
    tokens, hidden = x.shape
    slots = topk_ids.shape[1]
    experts, inner_blocks = w13.shape[:2]
    inner, hidden_up = inner_blocks * 64, w2.shape[1] * 64
    bits, table = find_bits(w13), name_tables(w13, int8)
    tile, inner_tile = (ACTIVATION_TILE, expert_activation_tile(inner)) if int8 else (0, 0)
    config = find_config(f"{table}_route", tokens=tokens)
    rows, block_experts = route(topk_ids, experts, config)
    block_m, num_blocks = config["BLOCK_M"], block_experts.shape[0]

    source, scale, inner_scale = x.contiguous(), None, None
    activated = x.new_empty((num_blocks * block_m, inner), dtype=torch.int8 if int8 else x.dtype)
    if int8:
        source, scale = quantize_int8(source, tile)
        inner_scale = scale.new_empty((num_blocks, inner // inner_tile, block_m))
    config = find_config(f"{table}_gate_up", tokens=tokens)
    launch(
        _gate_up_kernel,
        (num_blocks * (inner // 64),),
        source,
        scale,
        w13,
        w13_scale,
        rows,
        block_experts,
        activated,
        inner_scale,
        SLOTS=slots,
        K=hidden,
        INNER=inner,
        GROUP=group_size,
        BITS=bits,
        TILE=tile,
        INNER_TILE=inner_tile,
        BLOCK_M=block_m,
        **config,
    )
    config = find_config(f"{table}_down", tokens=tokens)
    config["BLOCK_N"] = _find_divisor(hidden_up, config["BLOCK_N"])
    config["REPEAT"] = _find_divisor(hidden_up // config["BLOCK_N"], config["REPEAT"])
    span = config["BLOCK_N"] * config["REPEAT"]
    programs = hidden_up // span
    # fp16 parts add an error of 0.02%, which only a result in fp32 would show.
    half = int8 and x.element_size() == 2
    parts = x.new_empty((tokens * slots, hidden), dtype=torch.float16 if half else torch.float32)
    unit = parts.new_empty((tokens * slots, programs), dtype=torch.float32) if half else None
    launch(
        _down_kernel,
        (num_blocks * programs,),
        activated,
        inner_scale,
        w2,
        w2_scale,
        topk_weights.contiguous(),
        rows,
        block_experts,
        parts,
        unit,
        K=inner,
        HIDDEN=hidden,
        HIDDEN_UP=hidden_up,
        GROUP=group_size,
        BITS=bits,
        TILE=inner_tile,
        BLOCK_M=block_m,
        **config,
    )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sum_slots(parts, unit, span, topk_ids, residual, experts, out)
    return out
