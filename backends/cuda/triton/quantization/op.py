"""INT8 quantization of activations with one scale per row and tile of columns."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _quantize_kernel(
    x,
    q,
    scale,
    rows,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantizes BLOCK tiles of x, or of silu(gate) * up if GATED; EXACT as `compute_int8_scale`
    takes it.

    x is `[rows, COLUMNS]`, or if GATED `[rows, 2 * COLUMNS]`, rows of gate and up. q is
    `int8 [rows, COLUMNS]`, scale `float32 [rows, ceil(COLUMNS / TILE)]`.
    """
    TILES: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    WIDTH: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, tile = (i // TILES).to(tl.int64), i % TILES
    valid = row < rows
    within = tl.arange(0, triton.next_power_of_2(TILE))
    column = tile[:, None] * TILE + within[None, :]
    mask = valid[:, None]
    if not EARLY:
        wait_for_previous()
    if triton.next_power_of_2(TILE) != TILE:
        mask = mask & (within < TILE)[None, :]
    if COLUMNS % TILE != 0:
        mask = mask & (column < COLUMNS)
    source = x + row[:, None] * WIDTH + column
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        value = silu(value) * tl.load(source + COLUMNS, mask=mask, other=0.0).to(tl.float32)
    inverse, tile_scale = compute_int8_scale(tl.max(tl.abs(value), axis=1), EXACT)
    quantized = round_to_int8(value * inverse[:, None]).to(tl.int8)
    # In front of the experts the previous kernel is the routing sort, which does not write x.
    if EARLY:
        wait_for_previous()
    tl.store(q + row[:, None] * COLUMNS + column, quantized, mask=mask)
    tl.store(scale + i, tile_scale, mask=valid)


def _quantize(
    x: torch.Tensor, columns: int, tile: int, exact: bool = True, early: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tiles = x.shape[0], cdiv(columns, tile)
    q = x.new_empty((rows, columns), dtype=torch.int8)
    scale = x.new_empty((rows, tiles), dtype=torch.float32)
    config = find_config("quantize_int8", tokens=rows)
    grid = (cdiv(rows * tiles, config["BLOCK"]),)
    launch(
        _quantize_kernel,
        grid,
        x.contiguous(),
        q,
        scale,
        rows,
        COLUMNS=columns,
        TILE=tile,
        GATED=columns != x.shape[1],
        EXACT=exact,
        EARLY=early,
        **config,
    )
    return q, scale


def quantize_int8(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.quantize_int8` of x `[M, K]`, bf16 or fp32, in one launch.

    Returns:
        `int8 [M, K]` and scales `float32 [M, ceil(K / tile)]`.
    """
    return _quantize(x, x.shape[1], tile)


def quantize_hidden(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_int8` of what experts have between their two products, in fp32.

    The kernel in front of it writes x, so that x is read behind the wait; and `compute_int8_scale`
    need not be exact.
    """
    return _quantize(x, x.shape[1], tile, exact=False, early=False)


def silu_quantize_int8(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.silu_quantize_int8` of x `[M, 2 * I]`, rows of gate and up, in one launch.

    Returns:
        `int8 [M, I]` and scales `float32 [M, ceil(I / tile)]`.
    """
    return _quantize(x, x.shape[1] // 2, tile)
