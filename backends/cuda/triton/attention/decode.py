"""Attention of one new token: the cache is split over programs, and their results are joined.

This is Flash-Decoding (Dao et al., "Flash-Decoding for long-context inference", 2023).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.attention.rope import (
    load_frequencies,
    load_heads,
    norm_and_rotate,
    sincos,
)
from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _compute_split_length(position, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many cached tokens a split has: an equal share, rounded up to whole tiles of BLOCK_N."""
    return tl.maximum(tl.cdiv(tl.cdiv(position, SPLITS), BLOCK_N), 1) * BLOCK_N


@triton.jit
def _decode_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    inv_freq_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position_ptr,
    num_tokens_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    CAPACITY: tl.constexpr,
    EPS: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One split of the cache, for the GROUP query heads of one KV head, padded to ROWS.

    It leaves the softmax's maximum (of logits in base 2) and sum, fp32 `[SPLITS, Hq]`, and the
    weighted sum of v, fp32 `[SPLITS, Hq, DIM]`. Split 0 makes the new token's k and v, uses them
    from registers and appends them to the cache. All else reads older rows of the cache, so nothing
    races.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    column = tl.arange(0, DIM)
    token = tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    in_group = row < GROUP
    head = kv_head * GROUP + row
    one = tl.arange(0, 1)
    # The first tile of the cache is on its way before q exists.
    frequency = load_frequencies(inv_freq_ptr, HALF, DIM)
    q_weights = load_heads(q_norm_ptr + one, one == 0, HALF, DIM)
    k_weights = load_heads(k_norm_ptr + one, one == 0, HALF, DIM)
    position = tl.load(position_ptr).to(tl.int32)
    length = _compute_split_length(position, SPLITS, BLOCK_N)
    start = split * length
    if (start >= position) & (split > 0):
        return
    end = tl.minimum(start + length, position)
    base = kv_head.to(tl.int64) * (CAPACITY * DIM)
    tile = base + (start + token)[:, None] * DIM + column[None, :]
    inside = (start + token < end)[:, None]
    k_next = tl.load(k_cache_ptr + tile, mask=inside, other=0.0)
    v_next = tl.load(v_cache_ptr + tile, mask=inside, other=0.0)
    sin, cos = sincos(position.to(tl.float32) * frequency)
    wait_for_previous()
    q_heads = load_heads(qkv_ptr + head * (2 * DIM), in_group, HALF, DIM)
    k_row = qkv_ptr + (2 * KV_HEADS * GROUP + kv_head) * DIM
    k_heads = load_heads(k_row + one, (one == 0) & (split == 0), HALF, DIM)
    v_new = tl.load(k_row + KV_HEADS * DIM + column, mask=(split == 0) & (column < DIM))
    q = norm_and_rotate(q_heads, q_weights, sin, cos, HALF, DIM, EPS)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    if split == 0:
        k = norm_and_rotate(k_heads, k_weights, sin, cos, HALF, DIM, EPS)
        k_new = tl.reshape(k, (DIM,))
        k_new = k_new.to(k_cache_ptr.dtype.element_ty)
        append = count_valid_tokens(num_tokens_ptr, 1, HAS_NUM_TOKENS) > 0
        new_row = base + position * DIM + column
        tl.store(k_cache_ptr + new_row, k_new, mask=append)
        tl.store(v_cache_ptr + new_row, v_new, mask=append)
        top = tl.sum(q * k_new.to(tl.float32)[None, :], 1) * SCALE_LOG2
        total += 1.0
        acc += v_new.to(tl.float32)[None, :]
    for first in range(start, end, BLOCK_N):
        k, v = k_next, v_next
        tile += BLOCK_N * DIM
        inside = (first + BLOCK_N + token < end)[:, None]
        k_next = tl.load(k_cache_ptr + tile, mask=inside, other=0.0)
        v_next = tl.load(v_cache_ptr + tile, mask=inside, other=0.0)
        s = dot(q, tl.trans(k), k_cache_ptr) * SCALE_LOG2
        s = tl.where((first + token < end)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p, v, v_cache_ptr)
        top = new_top
    slot = split * (KV_HEADS * GROUP) + head
    tl.store(max_ptr + slot, top, mask=in_group)
    tl.store(sum_ptr + slot, total, mask=in_group)
    tl.store(partial_ptr + slot[:, None] * DIM + column[None, :], acc, mask=in_group[:, None])


@triton.jit
def _combine_kernel(
    qkv_ptr,
    position_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Joins the splits of one query head, for BLOCK_D columns, and applies the output gate."""
    head = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, SPLITS)
    position = tl.load(position_ptr).to(tl.int32)
    gate = tl.load(qkv_ptr + head * (2 * DIM) + DIM + column).to(tl.float32)
    wait_for_previous()
    used = (split == 0) | (split * _compute_split_length(position, SPLITS, BLOCK_N) < position)
    slot = split * HEADS + head
    part = tl.load(
        partial_ptr + slot[:, None] * DIM + column[None, :], mask=used[:, None], other=0.0
    )
    top = tl.load(max_ptr + slot, mask=used, other=float("-inf"))
    total = tl.load(sum_ptr + slot, mask=used, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    o = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0) * tl.sigmoid(gate)
    tl.store(out_ptr + head * DIM + column, o.to(out_ptr.dtype.element_ty))


def attention_decode(inputs: tuple[torch.Tensor, ...], shape: dict) -> torch.Tensor:
    """Attention of one token: `[1, Hq * D]` in the dtype of qkv.

    Args:
        inputs: the leading arguments of `_decode_kernel` up to `num_tokens`, for which any tensor
            stands where HAS_NUM_TOKENS is false.
        shape: the constexprs of `_decode_kernel` but for ROWS and those of its configuration.
    """
    qkv, *_, position, _ = inputs
    heads, dim = shape["KV_HEADS"] * shape["GROUP"], shape["DIM"]
    out = qkv.new_empty((1, heads * dim))
    table = "attention_decode" if qkv.element_size() == 2 else "attention_decode_fp32"
    config = find_config(table, capacity=shape["CAPACITY"])
    splits = {n: config[n] for n in ("SPLITS", "BLOCK_N")}
    partial = qkv.new_empty((config["SPLITS"], heads, dim), dtype=torch.float32)
    top = qkv.new_empty((config["SPLITS"], heads), dtype=torch.float32)
    total = torch.empty_like(top)
    rows = max(16, triton.next_power_of_2(shape["GROUP"]))
    grid = (config["SPLITS"], shape["KV_HEADS"])
    launch(_decode_kernel, grid, *inputs, partial, top, total, ROWS=rows, **shape, **config)
    config = find_config("attention_combine", tokens=1)
    config["BLOCK_D"] = min(config["BLOCK_D"], dim)
    grid = (heads, dim // config["BLOCK_D"])
    joined = {"HEADS": heads, "DIM": dim, **splits, **config}
    launch(_combine_kernel, grid, qkv, position, partial, top, total, out, **joined)
    return out
