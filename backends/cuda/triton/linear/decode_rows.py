"""A linear layer of very many columns on a few rows: quantization, then a GEMV kernel.

The weights are read once, as for one row (`decode.py`), and multiplied with each row by the same
instructions. What a row gets does not depend on the rows beside it, and is what it gets alone, bit
for bit: integer products are exact, and all additions of floats have the order that they have in
`decode.py`. A thread adds up the runs of its piece one after the other, then the threads of a run
add up their pieces.

The rows are quantized by a kernel of their own. To do it in every thread block, as for one row,
would take six barriers a row there, one behind the other. The kernel takes a thread block a row,
while the weights of all others are on their way. What it writes is in the order in which threads
have the weights, so that each of them loads its own columns of the row, without shared memory.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.linear.decode import floor_power_of_two, supports_k
from et_moe.backends.cuda.triton.linear.layout import point_to_scale_pairs, split_scale_pair
from et_moe.backends.cuda.triton.linear.row_quantization import quantize_rows
from et_moe.backends.cuda.triton.linear.words import (
    multiply_apart,
    multiply_parts_as_floats,
    unpack_words,
)
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _split_words(words):
    """Splits words `[A, 4 B]` into four `[A, B]`; word 4 b + i of a row goes to the i-th."""
    even, odd = tl.reshape(words, (words.shape[0], words.shape[1] // 4, 2, 2)).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@triton.jit
def _load_row(q, SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr):
    """A thread's 16 columns of a run for each part of the weights, as from `_split_words`.

    Args:
        q: pointer to a row's columns of the run, as int32.
    """
    # There are BLOCK_N times the words, so that each thread loads those it needs.
    word = tl.broadcast_to(tl.arange(0, 32 * SPAN)[None, :], (BLOCK_N, 32 * SPAN))
    if BITS == 8:
        return (_split_words(tl.load(q + word)),)
    else:
        at = q + (word // 32 * 64 + word % 32)
        return _split_words(tl.load(at)), _split_words(tl.load(at + 32))


@triton.jit
def _load_scales(
    q_scale, row, run, piece, BLOCKS: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr
):
    """The fp32 scales of a row's tiles for the pieces of a run, of each part of the weights."""
    if BITS == 8:
        scales = q_scale + (row * BLOCKS + run * SPAN)
        return (tl.load(tl.max_contiguous(scales + piece // 8, (1, 1))),)
    else:
        # The scales of the two halves of a block, side by side.
        pairs = q_scale.to(tl.pointer_type(tl.int64)) + (row * BLOCKS + run * SPAN)
        pair = tl.load(tl.max_contiguous(pairs + piece // 8, (1, 1)))
        low = pair.to(tl.int32).to(tl.float32, bitcast=True)
        return low, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _rescale(totals, scales, row_scales, BITS: tl.constexpr, SCALE_TYPE: tl.constexpr):
    """fp32 products of a run, `[BLOCK_N, PIECES]`, of the products of each part, fp32.

    Args:
        scales: of the weights, those of INT4 in pairs.
        row_scales: as from `_load_scales`.
    """
    if BITS == 8:
        scale = scales.to(tl.float32) * row_scales[0]
        return multiply_apart(totals[0], scale)
    else:
        low_group, high_group = split_scale_pair(scales, SCALE_TYPE)
        y = totals[1] * (high_group * row_scales[1])
        # This is how the compiler fuses the two products for one row.
        return tl.fma(totals[0], low_group * row_scales[0], y)


@triton.jit
def _add_run(
    sums,
    q,
    q_scale,
    w,
    scales,
    run,
    M,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
):
    """`sums` with the products of one run of the weights added.

    Args:
        sums: fp32 `[BLOCK_N, PIECES]` of each row and each block of the weights, rows first; empty
            ahead of the first run.
        w, scales: words of the run and their scales, those of INT4 in pairs, of each block.
    """
    BLOCK_N: tl.constexpr = scales[0].shape[0]
    PIECES: tl.constexpr = scales[0].shape[1]
    PARTS: tl.constexpr = 8 // BITS
    KEEP: tl.constexpr = len(w)
    unpacked = ()
    for i in tl.static_range(KEEP):
        parts = ()
        for part in tl.static_range(PARTS):
            parts += (_split_words(unpack_words(w[i], part, BITS)),)
        unpacked += (parts,)
    piece = tl.broadcast_to(tl.arange(0, PIECES)[None, :], (BLOCK_N, PIECES))
    zero = tl.zeros((BLOCK_N, PIECES), tl.int32)
    result = ()
    for m in tl.static_range(ROWS):
        # Rows past the end are read as the last one; their results are not stored.
        row = tl.minimum(m, M - 1)
        words = q.to(tl.pointer_type(tl.int32)) + (row * BLOCKS + run * SPAN) * (PARTS * 32)
        row_q = _load_row(words, SPAN, BLOCK_N, BITS)
        row_q0 = row_q
        if PLANES == 2:
            row_q0 = _load_row(words + M * (BLOCKS * PARTS * 32), SPAN, BLOCK_N, BITS)
        row_scales = _load_scales(q_scale, row, run, piece, BLOCKS, SPAN, BITS)
        for i in tl.static_range(KEEP):
            totals = multiply_parts_as_floats(unpacked[i], row_q, row_q0, zero, PLANES)
            y = _rescale(totals, scales[i], row_scales, BITS, SCALE_TYPE)
            if len(sums) > 0:
                y += sums[m * KEEP + i]
            result += (y,)
    return result


@triton.jit
def _multiply_rows(
    q,
    q_scale,
    w,
    scales,
    residual,
    out,
    first_n,
    M,
    N,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
):
    """Computes and stores up to ROWS rows.

    w is a tuple of KEEP blocks for each run, and so are the scales of INT4 weights. Those of INT8
    weights are a tuple of KEEP blocks.
    """
    BLOCK_N: tl.constexpr = scales[0].shape[0]
    PIECES: tl.constexpr = scales[0].shape[1]
    n = first_n + tl.arange(0, BLOCK_N)
    sums = ()
    for run in tl.static_range(BLOCKS // SPAN):
        run_w, run_scales = (), ()
        for i in tl.static_range(KEEP):
            run_w += (w[run * KEEP + i],)
            run_scales += (scales[i] if BITS == 8 else scales[run * KEEP + i],)
        sums = _add_run(
            *(sums, q, q_scale, run_w, run_scales, run, M),
            *(BLOCKS, SPAN, BITS, PLANES, ROWS, SCALE_TYPE),
        )
    for m in tl.static_range(ROWS):
        for i in tl.static_range(KEEP):
            at = m * N + n + i * BLOCK_N
            inside = (n >= 0) & (m < M)
            y = tl.sum(sums[m * KEEP + i], axis=1)
            if residual is not None:
                y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            store_once(out + at, y.to(out.dtype.element_ty), inside, PIECES)


@triton.jit
def _rows_kernel(
    q,
    q_scale,
    weight,
    weight_scale,
    residual,
    out,
    M,
    N,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Product and residual of M rows, from 2 to ROWS, for KEEP times BLOCK_N columns of out.

    q is int8 `[PLANES, M, K]` and q_scale fp32 `[M, K / 128]`, as from `quantize_rows`. A row
    of the weight is BLOCKS blocks of 128 bytes, in runs of SPAN blocks. The threads hold BLOCK_N
    times a run at once, 16 bytes each, as the threads of `_gemv_kernel` do.
    """
    PIECES: tl.constexpr = 8 * SPAN
    RUNS: tl.constexpr = BLOCKS // SPAN
    # The last program overlaps its neighbour; both store the same.
    first_n = min(tl.program_id(0) * (BLOCK_N * KEEP), N - BLOCK_N * KEEP)
    row, piece = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, PIECES)[None, :]
    words = weight.to(tl.pointer_type(tl.int32)) + first_n.to(tl.int64) * (BLOCKS * 32)
    words += row * (BLOCKS * 32) + tl.arange(0, 4 * PIECES)[None, :]
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    # Without the hints, scales would be loaded in another layout than the weights.
    if BITS == 4:
        pairs = point_to_scale_pairs(weight_scale) + (first_n + row)
    else:
        copies = first_n + tl.broadcast_to(row, (BLOCK_N, PIECES))
        run_scales = tl.max_contiguous(weight_scale + copies, (1, 1))
    w, scales = (), ()
    for run in tl.static_range(RUNS):
        if BITS == 4:
            group = (run * PIECES + piece) * 16 // GROUP
            run_scales = tl.max_contiguous(pairs + group * N, (1, 1))
        for i in tl.static_range(KEEP):
            at = words + (i * (BLOCK_N * BLOCKS * 32) + run * (4 * PIECES))
            w += (tl.load(at, eviction_policy="evict_first"),)
            if BITS == 4 or run == 0:
                scales += (tl.load(run_scales + i * BLOCK_N),)
    wait_for_previous()
    if M <= ROWS // 2:
        _multiply_rows(
            *(q, q_scale, w, scales, residual, out, first_n, M, N),
            *(BLOCKS, SPAN, BITS, PLANES, KEEP, ROWS // 2, SCALE_TYPE),
        )
    else:
        _multiply_rows(
            *(q, q_scale, w, scales, residual, out, first_n, M, N),
            *(BLOCKS, SPAN, BITS, PLANES, KEEP, ROWS, SCALE_TYPE),
        )


def _find_span(n: int, blocks: int, bits: int) -> tuple[int, bool]:
    """Blocks of a run of `linear_decode`, and whether its threads add up runs on their own."""
    config = find_config(f"linear_w{bits}_gemv", out_features=n)
    span, block_n = min(config["SPAN"], blocks), min(config["BLOCK_ROWS"] // blocks, n)
    return span, floor_power_of_two(block_n) * 8 * span >= 32 * config["num_warps"]


def supports_rows(n: int, k: int, rows: int, bits: int = 4) -> bool:
    """Whether `linear_decode_rows` takes a weight `[N, K]` of 4 or 8 bits for so many rows.

    It does where `linear_decode` takes it and does not divide the runs of a result between warps,
    and where N is large enough for all threads.
    """
    if not supports_k(k):
        return False
    span, alone = _find_span(n, k * bits // 1024, bits)
    warps = find_config(f"linear_w{bits}_rows", tokens=rows)["num_warps"]
    return alone and n * 8 * span >= 32 * warps


def linear_decode_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    planes: int,
    rows: int,
) -> torch.Tensor:
    """A linear layer (`op.py`) on x `[T, K]`, `supports_rows` given.

    Args:
        group_size: None for INT8 weights; planes: INT8 planes of the activations.
        rows: the largest T of all calls.

    Returns:
        `[T, N]` in x's dtype.
    """
    (m, k), n, bits = x.shape, weight.shape[0], 8 if group_size is None else 4
    blocks = weight.shape[1] // 128
    span = _find_span(n, blocks, bits)[0]
    config = find_config(f"linear_w{bits}_rows", tokens=rows)
    block_n = max(1, 32 * config["num_warps"] // (8 * span))
    keep = max(1, config.pop("BLOCK_ROWS") // (blocks * block_n))
    keep = min(keep, floor_power_of_two(n // block_n))
    # The order of additions in the row's norm depends on the number of warps.
    warps = find_config(f"linear_w{bits}_gemv", out_features=n)["num_warps"]
    q, q_scale = quantize_rows(x, norm_weight, eps, k, planes, m, True, warps, bits)
    out = x.new_empty((m, n))
    launch(
        _rows_kernel,
        (cdiv(n, block_n * keep),),
        q,
        q_scale,
        weight,
        scale,
        residual,
        out,
        m,
        n,
        BLOCKS=blocks,
        SPAN=span,
        GROUP=group_size,
        BITS=bits,
        PLANES=planes,
        BLOCK_N=block_n,
        KEEP=keep,
        ROWS=triton.next_power_of_2(rows),
        **config,
    )
    return out
