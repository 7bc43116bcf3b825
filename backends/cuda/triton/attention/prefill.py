"""Attention of a prompt: k and v are appended to the cache, then FlashAttention-2 (Dao, 2023)."""

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
from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.quantized_rows import QuantizedRows, RowFormat
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens
from et_moe.backends.cuda.triton.tuning import find_config, find_largest
from et_moe.backends.ops import PAGE_SIZE

FEW_TOKENS = 64
"""Up to this many tokens have few tiles of rows, each of which would read all of the cache."""
MAX_SPLITS = 16
SPLIT_TOKENS = 512
"""The fewest tokens of a split, but for the last."""


@triton.jit
def _append_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    inv_freq_ptr,
    k_cache_ptr,
    v_cache_ptr,
    pages_ptr,
    positions_ptr,
    num_tokens_ptr,
    q_ptr,
    tokens,
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
):
    """Norms and rotates one token's k and its group of q; k and v go to the cache.

    q is left times SCALE_LOG2, the softmax's scale for base 2, as `[Hq, T, DIM]`.
    """
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    column = tl.arange(0, DIM)
    row = tl.arange(0, ROWS)
    in_group = row < GROUP
    one = tl.arange(0, 1)
    # Everything else is loaded before qkv exists, and all of qkv before any of it is used.
    valid = count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS)
    start = tl.load(positions_ptr).to(tl.int32)
    position = start + token
    page = load_page(pages_ptr, position, start + valid)
    q_weights = load_heads(q_norm_ptr + one, one == 0, HALF, DIM)
    k_weights = load_heads(k_norm_ptr + one, one == 0, HALF, DIM)
    frequency = load_frequencies(inv_freq_ptr, HALF, DIM)
    sin, cos = sincos(position.to(tl.float32) * frequency)
    wait_for_previous()
    if token >= valid:
        return
    token_ptr = qkv_ptr + token.to(tl.int64) * (2 * KV_HEADS * (GROUP + 1) * DIM)
    head = kv_head * GROUP + row
    k_row = token_ptr + (2 * KV_HEADS * GROUP + kv_head) * DIM
    q_heads = load_heads(token_ptr + head * (2 * DIM), in_group, HALF, DIM)
    k_heads = load_heads(k_row + one, one == 0, HALF, DIM)
    v = tl.load(k_row + KV_HEADS * DIM + column)
    q = norm_and_rotate(q_heads, q_weights, sin, cos, HALF, DIM, EPS)
    k = norm_and_rotate(k_heads, k_weights, sin, cos, HALF, DIM, EPS)
    q_tile = (head.to(tl.int64) * tokens + token)[:, None] * DIM + column[None, :]
    tl.store(q_ptr + q_tile, (q * SCALE_LOG2).to(q_ptr.dtype.element_ty), mask=in_group[:, None])
    cache_row = find_row(page, position, kv_head, KV_HEADS, DIM) + column
    tl.store(k_cache_ptr + cache_row, tl.reshape(k, (DIM,)).to(k_cache_ptr.dtype.element_ty))
    tl.store(v_cache_ptr + cache_row, v)


@triton.jit
def _attend_tile(
    q,
    k_ptr,
    v_ptr,
    row,
    first,
    position,
    end,
    top,
    total,
    acc,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attends to the BLOCK_N cached tokens from `first` on, with an online softmax.

    Args:
        row: the element of the caches at which the first of these tokens begins.
        position: `[BLOCK_M]` of the queries; end: the number of tokens in the cache.
        top, total, acc: fp32 `[BLOCK_M]`, `[BLOCK_M]` and `[BLOCK_M, DIM]`: maximum and sum of the
            softmax so far, and the weighted sum of v.
        MASKED: whether some of the cached tokens lie behind a query's position or the end.
        FIRST_TOKEN: in front of which no token is read; 0, or MASKED must be true.
        SPLIT: whether these may be the first tokens that a query sees, and hidden from it.

    Returns:
        top, total and acc with these tokens.
    """
    token = tl.arange(0, BLOCK_N)
    tile = row + token[:, None] * DIM + tl.arange(0, DIM)[None, :]
    if MASKED:
        inside = (token < end - first)[:, None]
        if FIRST_TOKEN > 0:
            inside &= (token >= FIRST_TOKEN - first)[:, None]
        k = tl.load(k_ptr + tile, mask=inside, other=0.0)
        v = tl.load(v_ptr + tile, mask=inside, other=0.0)
    else:
        k = tl.load(k_ptr + tile)
        v = tl.load(v_ptr + tile)
    s = dot(q, tl.trans(k), k_ptr)
    if MASKED:
        s = tl.where((position - first)[:, None] >= token[None, :], s, float("-inf"))
    if FIRST_TOKEN > 0:
        s = tl.where((token >= FIRST_TOKEN - first)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    if FIRST_TOKEN > 0 or (SPLIT and MASKED):
        new_top = tl.maximum(new_top, NO_TOP)
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + dot(p, v, v_ptr)
    return new_top, total, acc


@triton.jit
def _flash_kernel(
    q_ptr,
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    pages_ptr,
    positions_ptr,
    num_tokens_ptr,
    out_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    tokens,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Causal attention of BLOCK_M tokens of one query head, and its gate. Padding becomes 0, and so
    do tokens in front of FIRST_TOKEN.

    If there are several SPLITS of the cache, of LEAST tokens or more, a program attends to one of
    them, and leaves for `combine_kernel` what `_decode_kernel` does: maximum and sum of the
    softmax, fp32 `[T, SPLITS, Hq]`, and the weighted sum of v, `[T, SPLITS, Hq, DIM]`. The maximum
    of a split without tokens is -inf.
    """
    tl.static_assert(PAGE % BLOCK_N == 0, "a tile must lie in one page")
    head = tl.program_id(0)
    kv_head = head // GROUP
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows first
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DIM)
    valid = count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS).to(tl.int32)
    position = tl.load(positions_ptr).to(tl.int32)
    inside = (row < valid - start)[:, None]
    ROW: tl.constexpr = 2 * (HEADS + HEADS // GROUP) * DIM
    qkv_ptr += start.to(tl.int64) * ROW + head * (2 * DIM) + DIM
    gate_tile = qkv_ptr + row[:, None] * ROW + column[None, :]
    if SPLITS == 1 and BLOCK_M <= 32:  # more rows would take registers that the products need
        gate = tl.load(gate_tile, mask=inside, other=0.0)
    wait_for_previous()
    out_ptr += start.to(tl.int64) * (HEADS * DIM) + head * DIM
    out_tile = out_ptr + row[:, None] * (HEADS * DIM) + column[None, :]
    in_out = (row < tokens - start)[:, None]
    if start >= valid:
        if SPLITS == 1:
            tl.store(out_tile, tl.zeros((BLOCK_M, DIM), out_ptr.dtype.element_ty), mask=in_out)
        return
    q_ptr += (head.to(tl.int64) * tokens + start) * DIM
    q = tl.load(q_ptr + row[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    end = position + tl.minimum(start + BLOCK_M, valid)
    seen_by_all = (position + start + 1) // BLOCK_N * BLOCK_N
    split_begin, split_end = 0, end
    if SPLITS > 1:
        split = tl.program_id(2)
        slot = ((start + row) * SPLITS + split) * HEADS + head
        length = tl.maximum(divide(position + valid, SPLITS, BLOCK_N)[0], LEAST)
        split_begin, split_end = split * length, tl.minimum((split + 1) * length, end)
        if split_begin >= split_end:
            nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            tl.store(max_ptr + slot, nothing, mask=row < valid - start)
            return
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    page = load_page(pages_ptr, split_begin, end)  # always a tile ahead
    begin = split_begin
    if FIRST_TOKEN > 0:
        begin = tl.minimum(tl.cdiv(FIRST_TOKEN, BLOCK_N) * BLOCK_N, split_end)
        begin = tl.maximum(begin, split_begin)
    if FIRST_TOKEN > 0 or SPLITS > 1:
        seen_by_all = tl.minimum(tl.maximum(seen_by_all, begin), split_end)
    if FIRST_TOKEN > 0:
        for first in tl.range(split_begin, begin, BLOCK_N, num_stages=1):
            row_of_tile = find_row(page, first, kv_head, HEADS // GROUP, DIM)
            page = load_page(pages_ptr, first + BLOCK_N, end)
            top, total, acc = _attend_tile(
                q,
                k_cache_ptr,
                v_cache_ptr,
                row_of_tile,
                first,
                position + start + row,
                end,
                top,
                total,
                acc,
                DIM,
                BLOCK_N,
                True,
                FIRST_TOKEN,
                SPLITS > 1,
            )
    for first in tl.range(begin, seen_by_all, BLOCK_N, num_stages=STAGES):
        row_of_tile = find_row(page, first, kv_head, HEADS // GROUP, DIM)
        page = load_page(pages_ptr, first + BLOCK_N, end)
        top, total, acc = _attend_tile(
            q,
            k_cache_ptr,
            v_cache_ptr,
            row_of_tile,
            first,
            position + start + row,
            end,
            top,
            total,
            acc,
            DIM,
            BLOCK_N,
            False,
            0,
            SPLITS > 1,
        )
    for first in tl.range(seen_by_all, split_end, BLOCK_N, num_stages=STAGES):
        row_of_tile = find_row(page, first, kv_head, HEADS // GROUP, DIM)
        page = load_page(pages_ptr, first + BLOCK_N, end)
        top, total, acc = _attend_tile(
            q,
            k_cache_ptr,
            v_cache_ptr,
            row_of_tile,
            first,
            position + start + row,
            end,
            top,
            total,
            acc,
            DIM,
            BLOCK_N,
            True,
            0,
            SPLITS > 1,
        )
    if SPLITS > 1:
        mask = row < valid - start
        tl.store(max_ptr + slot, top, mask=mask)
        tl.store(sum_ptr + slot, total, mask=mask)
        tl.store(partial_ptr + slot[:, None] * DIM + column[None, :], acc, mask=mask[:, None])
    else:
        if BLOCK_M > 32:
            gate = tl.load(gate_tile, mask=inside, other=0.0)
        o = acc / total[:, None] * tl.sigmoid(gate.to(tl.float32))
        if FIRST_TOKEN > 0:
            inside &= (position + start + row >= FIRST_TOKEN)[:, None]
        tl.store(out_tile, tl.where(inside, o, 0.0).to(out_ptr.dtype.element_ty), mask=in_out)


def _count_splits(tokens: int | torch.SymInt, capacity: int) -> int:
    """Into how many splits the cache is divided for the tokens of a call, a power of two; 1 where
    tiles of rows keep the GPU busy, and where a cache is small."""
    if find_largest(tokens) > FEW_TOKENS:
        return 1
    return min(MAX_SPLITS, triton.next_power_of_2(cdiv(capacity, SPLIT_TOKENS)))


def attention_prefill(
    inputs: tuple[torch.Tensor, ...], shape: dict, wanted: RowFormat | None
) -> torch.Tensor | QuantizedRows:
    """Attention of any number of tokens of one sequence: `[T, Hq * D]` in the dtype of qkv; or
    quantized, where splits are joined, see `join_splits`.

    Args:
        inputs: the leading arguments of `_append_kernel` up to `num_tokens`, for which any tensor
            stands where HAS_NUM_TOKENS is false.
        shape: the constexprs of `_append_kernel` but for ROWS.
    """
    qkv, *_, k_cache, v_cache, pages, positions, num_tokens = inputs
    tokens, heads, dim = qkv.shape[0], shape["KV_HEADS"] * shape["GROUP"], shape["DIM"]
    out = qkv.new_empty((tokens, heads * dim))
    q = qkv.new_empty((heads, tokens, dim))
    config = find_config("attention_append", tokens=tokens)
    rows = triton.next_power_of_2(shape["GROUP"])
    grid = (tokens, shape["KV_HEADS"])
    launch(_append_kernel, grid, *inputs, q, tokens, ROWS=rows, **shape, **config)
    if shape["FIRST_TOKEN"] >= PAGE_SIZE * shape["MAX_PAGES"]:  # no row attends to anything
        return torch.zeros_like(out)
    table = "attention_prefill" if qkv.element_size() == 2 else "attention_prefill_fp32"
    config = find_config(table, tokens=tokens)
    splits = _count_splits(tokens, PAGE_SIZE * shape["MAX_PAGES"])
    parts = (None, None, None)
    if splits > 1:
        partial = qkv.new_empty((tokens, splits, heads, dim), dtype=torch.float32)
        top = qkv.new_empty((tokens, splits, heads), dtype=torch.float32)
        parts = (partial, top, torch.empty_like(top))
    launch(
        _flash_kernel,
        (heads, cdiv(tokens, config["BLOCK_M"]), splits),
        q,
        qkv,
        k_cache,
        v_cache,
        pages,
        positions,
        num_tokens,
        out,
        *parts,
        tokens,
        HEADS=heads,
        SPLITS=splits,
        LEAST=SPLIT_TOKENS,
        **{n: shape[n] for n in ("GROUP", "DIM", "HAS_NUM_TOKENS", "FIRST_TOKEN")},
        **config,
    )
    if splits > 1:
        names = ("KV_HEADS", "DIM", "HAS_NUM_TOKENS", "FIRST_TOKEN")
        joined = {n: shape[n] for n in names} | {"TOKENS": FEW_TOKENS, "SPLITS": splits}
        arguments = (qkv, positions, num_tokens, *parts)
        return join_splits(arguments, heads, joined | {"BLOCK_N": 0}, wanted)
    return out
