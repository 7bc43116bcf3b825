"""Attention of a new token per sequence, or a few: caches are split over programs, then joined.

This is Flash-Decoding (Dao et al., "Flash-Decoding for long-context inference", 2023). How a cache
is split, and in which order the splits are joined, follows from the position of its sequence alone.
So a sequence gets the same bits whatever shares the batch: programs are shared out among sequences
by letting each take several splits, one after the other.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.attention.combine import divide, join_splits
from et_moe.backends.cuda.triton.attention.pages import NO_TOP, PAGE, find_row, load_page
from et_moe.backends.cuda.triton.attention.rope import (
    load_frequencies,
    load_heads,
    norm_and_rotate,
    sincos,
)
from et_moe.backends.cuda.triton.attention.rows import append_rows_kernel
from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.launch import cdiv, is_one, launch
from et_moe.backends.cuda.triton.common.quantized_rows import QuantizedRows, RowFormat
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, find_sequence
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import PAGE_SIZE

BATCH_PROGRAMS = 1024
"""About how many programs attend to a batch: several for each multiprocessor, since sequences may
be of very different lengths."""


@triton.jit
def _count_programs(position, BLOCK_N: tl.constexpr, BATCHED: tl.constexpr):
    """How many programs share the splits of a cache. Those of a batch take four tiles or more, as
    far as a quarter of them can: the next tile is on its way while one is attended to, but what
    comes before the first takes as long as several."""
    programs = tl.num_programs(0)
    if BATCHED:
        wanted = tl.cdiv(tl.cdiv(position, BLOCK_N), 4)
        programs = tl.minimum(programs, tl.maximum(wanted, tl.cdiv(programs, 4)))
    return programs


@triton.jit
def _find_next(first, length, programs, BLOCK_N: tl.constexpr, BATCHED: tl.constexpr):
    """The tile that a program takes after the one at `first`. If BATCHED, its next split follows
    its last one."""
    following = first + BLOCK_N
    if BATCHED:
        skipped = (programs - 1) * length
        following = tl.where(following % length == 0, following + skipped, following)
    return following


@triton.jit
def _load_tile(
    cache,
    page,
    first,
    end,
    kv_head,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
):
    """k and v, `[BLOCK_N, DIM]`, of the cached tokens from `first` on, zeros from `end` on and in
    front of FIRST_TOKEN."""
    _, k_cache_ptr, v_cache_ptr = cache
    token = tl.arange(0, BLOCK_N)
    row = find_row(page, first, kv_head, KV_HEADS, DIM)
    tile = token[:, None] * DIM + tl.arange(0, DIM)[None, :]
    inside = (token < end - first)[:, None]
    if FIRST_TOKEN > 0:
        inside &= (token >= FIRST_TOKEN - first)[:, None]
    k = tl.load(k_cache_ptr + row + tile, mask=inside, other=0.0)
    return k, tl.load(v_cache_ptr + row + tile, mask=inside, other=0.0)


@triton.jit
def _attend_split(
    q,
    softmax,
    tile,
    cache,
    split,
    programs,
    position,
    end,
    kv_head,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BATCHED: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
):
    """Attends to the cached tokens of one split, with an online softmax.

    Args:
        q: fp32 `[ROWS, DIM]`.
        softmax: of what comes first, fp32: maximum and sum, `[ROWS]`, and the weighted sum of v,
            `[ROWS, DIM]`.
        tile: k and v of the split's first tile, and the page of the tile that the program takes
            after it.
        cache: pointers to the sequence's page table, and to the caches of k and v.
        programs: as from `_count_programs`.
        end: where the tokens end that this program may load.

    Returns:
        softmax with this split, and tile of the program's next split.
    """
    top, total, acc = softmax
    k_next, v_next, page = tile
    pages_ptr, k_cache_ptr, v_cache_ptr = cache
    token = tl.arange(0, BLOCK_N)
    length, _ = divide(position, SPLITS, BLOCK_N)
    start = split * length
    for first in range(start, tl.minimum(start + length, position), BLOCK_N):
        k, v = k_next, v_next
        following = _find_next(first, length, programs, BLOCK_N, BATCHED)
        k_next, v_next = _load_tile(
            cache, page, following, end, kv_head, KV_HEADS, DIM, BLOCK_N, FIRST_TOKEN
        )
        page = load_page(pages_ptr, _find_next(following, length, programs, BLOCK_N, BATCHED), end)
        s = dot(q, tl.trans(k), k_cache_ptr) * SCALE_LOG2
        s = tl.where((first + token < position)[None, :], s, float("-inf"))
        if FIRST_TOKEN > 0:
            s = tl.where((first + token >= FIRST_TOKEN)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        if FIRST_TOKEN > 0:
            new_top = tl.maximum(new_top, NO_TOP)
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p, v, v_cache_ptr)
        top = new_top
    return (top, total, acc), (k_next, v_next, page)


@triton.jit
def _store_split(partial, softmax, split, head, in_group, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Stores what `_attend_split` gives of the query heads `head`, `[ROWS]`, where in_group.

    partial: pointers to the sequence's weighted sums, maxima and sums.
    """
    partial_ptr, max_ptr, sum_ptr = partial
    top, total, acc = softmax
    slot = split * HEADS + head
    tl.store(max_ptr + slot, top, mask=in_group)
    tl.store(sum_ptr + slot, total, mask=in_group)
    at = slot[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(partial_ptr + at, acc, mask=in_group[:, None])


@triton.jit
def _decode_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    inv_freq_ptr,
    k_cache_ptr,
    v_cache_ptr,
    pages_ptr,
    positions_ptr,
    num_tokens_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    EPS: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BATCHED: tl.constexpr,
):
    """Splits of a sequence's cache, for the GROUP query heads of one KV head, padded to ROWS.

    Of each split it leaves the softmax's maximum (of logits in base 2) and sum, fp32
    `[B, SPLITS, Hq]`, and the weighted sum of v, fp32 `[B, SPLITS, Hq, DIM]`. Split 0 makes the new
    token's k and v, uses them from registers and appends them to the cache. All else reads older
    rows of the cache, so nothing races. If BATCHED, a program takes every n-th split, see
    `_count_programs`; else it takes one.

    Each of a sequence's TOKENS rows is attended to as if it came alone. If there are several, then
    `append_rows_kernel` has appended k and v of all.
    """
    tl.static_assert(PAGE % BLOCK_N == 0, "a tile must lie in one page")
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    item = tl.program_id(2)
    column = tl.arange(0, DIM)
    row = tl.arange(0, ROWS)
    in_group = row < GROUP
    head = kv_head * GROUP + row
    one = tl.arange(0, 1)
    # The first tile of the cache is on its way before q exists.
    frequency = load_frequencies(inv_freq_ptr, HALF, DIM)
    q_weights = load_heads(q_norm_ptr + one, one == 0, HALF, DIM)
    k_weights = load_heads(k_norm_ptr + one, one == 0, HALF, DIM)
    sequence, token = find_sequence(item, TOKENS)
    position = tl.load(positions_ptr + sequence).to(tl.int32) + token
    length, used = divide(position, SPLITS, BLOCK_N)
    programs = _count_programs(position, BLOCK_N, BATCHED)
    valid = count_valid_tokens(num_tokens_ptr + sequence, TOKENS, HAS_NUM_TOKENS) - token
    if (split >= tl.minimum(used, programs)) | (valid <= 0):
        return
    first = split * length
    end = position
    if not BATCHED:
        end = tl.minimum(first + length, position)
    pages_ptr += sequence * MAX_PAGES
    cache = (pages_ptr, k_cache_ptr, v_cache_ptr)
    page = load_page(pages_ptr, first, end)
    if TOKENS == 1:
        k, v = _load_tile(cache, page, first, end, kv_head, KV_HEADS, DIM, BLOCK_N, FIRST_TOKEN)
    first_page = page
    page = load_page(pages_ptr, _find_next(first, length, programs, BLOCK_N, BATCHED), end)
    new_page = load_page(pages_ptr, position, tl.where(split == 0, position + 1, 0))
    sin, cos = sincos(position.to(tl.float32) * frequency)
    HEADS: tl.constexpr = KV_HEADS * GROUP
    slot = item * (SPLITS * HEADS)
    partial = (partial_ptr + slot.to(tl.int64) * DIM, max_ptr + slot, sum_ptr + slot)
    qkv_ptr += item.to(tl.int64) * (2 * (HEADS + KV_HEADS) * DIM)
    wait_for_previous()
    if TOKENS > 1:  # it may have been appended only now
        k, v = _load_tile(
            cache, first_page, first, end, kv_head, KV_HEADS, DIM, BLOCK_N, FIRST_TOKEN
        )
    q_heads = load_heads(qkv_ptr + head * (2 * DIM), in_group, HALF, DIM)
    k_row = qkv_ptr + (2 * HEADS + kv_head) * DIM
    k_heads = load_heads(k_row + one, (one == 0) & (split == 0), HALF, DIM)
    v_new = tl.load(k_row + KV_HEADS * DIM + column, mask=(split == 0) & (column < DIM))
    q = norm_and_rotate(q_heads, q_weights, sin, cos, HALF, DIM, EPS)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    if split == 0:
        k_new = norm_and_rotate(k_heads, k_weights, sin, cos, HALF, DIM, EPS)
        k_new = tl.reshape(k_new, (DIM,))
        k_new = k_new.to(k_cache_ptr.dtype.element_ty)
        new_row = find_row(new_page, position, kv_head, KV_HEADS, DIM) + column
        if TOKENS == 1:
            tl.store(k_cache_ptr + new_row, k_new)
            tl.store(v_cache_ptr + new_row, v_new)
        top = tl.sum(q * k_new.to(tl.float32)[None, :], 1) * SCALE_LOG2
        total += 1.0
        acc += v_new.to(tl.float32)[None, :]
    softmax, tile = _attend_split(
        q,
        (top, total, acc),
        (k, v, page),
        cache,
        split,
        programs,
        position,
        end,
        kv_head,
        KV_HEADS,
        DIM,
        SCALE_LOG2,
        SPLITS,
        BLOCK_N,
        BATCHED,
        FIRST_TOKEN,
    )
    _store_split(partial, softmax, split, head, in_group, HEADS, DIM)
    if BATCHED:
        k, v, page = tile
        empty = (
            tl.full((ROWS,), float("-inf"), tl.float32),
            tl.zeros((ROWS,), tl.float32),
            tl.zeros((ROWS, DIM), tl.float32),
        )
        for own in range(split + programs, used, programs):
            softmax, tile = _attend_split(
                q,
                empty,
                (k, v, page),
                cache,
                own,
                programs,
                position,
                end,
                kv_head,
                KV_HEADS,
                DIM,
                SCALE_LOG2,
                SPLITS,
                BLOCK_N,
                BATCHED,
                FIRST_TOKEN,
            )
            k, v, page = tile
            _store_split(partial, softmax, own, head, in_group, HEADS, DIM)


def attention_decode(
    inputs: tuple[torch.Tensor, ...], shape: dict, tokens: int, wanted: RowFormat | None
) -> torch.Tensor | QuantizedRows:
    """Attention of `tokens` tokens of each of B sequences: `[B * tokens, Hq * D]` in the dtype of
    qkv, or quantized, see `join_splits`.

    Args:
        inputs: the leading arguments of `_decode_kernel` up to `num_tokens`, for which any tensor
            stands where HAS_NUM_TOKENS is false.
        shape: the constexprs of `_decode_kernel` up to FIRST_TOKEN, but for ROWS.
    """
    qkv, *_, positions, num_tokens = inputs
    sequences, rows = positions.shape[0], qkv.shape[0]
    kv_heads, dim = shape["KV_HEADS"], shape["DIM"]
    heads = kv_heads * shape["GROUP"]
    table = "attention_decode" if qkv.element_size() == 2 else "attention_decode_fp32"
    # All lookups are independent of the number of sequences: the arithmetic must be.
    config = find_config(table, capacity=PAGE_SIZE * shape["MAX_PAGES"])
    splits = {n: config[n] for n in ("SPLITS", "BLOCK_N")}
    partial = qkv.new_empty((rows, config["SPLITS"], heads, dim), dtype=torch.float32)
    top = qkv.new_empty((rows, config["SPLITS"], heads), dtype=torch.float32)
    total = torch.empty_like(top)
    batched = not is_one(sequences)
    programs = cdiv(BATCH_PROGRAMS, rows * kv_heads) if batched else config["SPLITS"]
    fills = shape["FIRST_TOKEN"] >= PAGE_SIZE * shape["MAX_PAGES"]
    if tokens > 1 or fills:
        names = ("KV_HEADS", "GROUP", "DIM", "HALF", "MAX_PAGES", "EPS", "HAS_NUM_TOKENS")
        appended = {n: shape[n] for n in names} | {"num_warps": config["num_warps"]}
        grid = (1, kv_heads, rows)
        launch(append_rows_kernel, grid, *inputs, **appended, TOKENS=tokens)
    if fills:  # no row attends to anything
        return qkv.new_zeros((rows, heads * dim))
    shape = shape | {"TOKENS": tokens}
    config |= {"ROWS": max(16, triton.next_power_of_2(shape["GROUP"])), "BATCHED": batched}
    grid = (programs, kv_heads, rows)
    launch(_decode_kernel, grid, *inputs, partial, top, total, **shape, **config)
    names = ("KV_HEADS", "DIM", "HAS_NUM_TOKENS", "FIRST_TOKEN", "TOKENS")
    joined = {n: shape[n] for n in names} | splits
    arguments = (qkv, positions, num_tokens, partial, top, total)
    return join_splits(arguments, heads, joined, wanted)
