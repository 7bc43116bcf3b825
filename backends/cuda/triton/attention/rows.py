"""The rows of sequences that decode: where they lie, and how their k and v get into the cache."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.attention.pages import find_row, load_page
from et_moe.backends.cuda.triton.attention.rope import (
    load_frequencies,
    load_heads,
    norm_and_rotate,
    sincos,
)
from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, find_sequence


@triton.jit
def append_rows_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    inv_freq_ptr,
    k_cache_ptr,
    v_cache_ptr,
    pages_ptr,
    positions_ptr,
    num_tokens_ptr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Appends k and v of one row and KV head to the cache, with the arithmetic of
    `_decode_kernel`, which needs as many warps for that."""
    kv_head = tl.program_id(1)
    column, one = tl.arange(0, DIM), tl.arange(0, 1)
    row = tl.program_id(2)
    sequence, token = find_sequence(row, TOKENS)
    # Not by a function that takes the pointer: torch would take the positions for updated, as it
    # does all that a function is given whose result takes part in the address of a store.
    position = tl.load(positions_ptr + sequence).to(tl.int32) + token
    if count_valid_tokens(num_tokens_ptr + sequence, TOKENS, HAS_NUM_TOKENS) <= token:
        return
    frequency = load_frequencies(inv_freq_ptr, HALF, DIM)
    k_weights = load_heads(k_norm_ptr + one, one == 0, HALF, DIM)
    page = load_page(pages_ptr + sequence * MAX_PAGES, position, position + 1)
    sin, cos = sincos(position.to(tl.float32) * frequency)
    k_row = qkv_ptr + row.to(tl.int64) * (2 * KV_HEADS * (GROUP + 1) * DIM)
    k_row += (2 * KV_HEADS * GROUP + kv_head) * DIM
    wait_for_previous()
    k_heads = load_heads(k_row + one, one == 0, HALF, DIM)
    v = tl.load(k_row + KV_HEADS * DIM + column)
    k = norm_and_rotate(k_heads, k_weights, sin, cos, HALF, DIM, EPS)
    new_row = find_row(page, position, kv_head, KV_HEADS, DIM) + column
    tl.store(k_cache_ptr + new_row, tl.reshape(k, (DIM,)).to(k_cache_ptr.dtype.element_ty))
    tl.store(v_cache_ptr + new_row, v)
