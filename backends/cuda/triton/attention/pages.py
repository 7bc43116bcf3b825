"""Where tokens lie in a KV cache of pages, `[P, KV_HEADS, PAGE, DIM]`.

A tile of BLOCK_N tokens that starts at a multiple of BLOCK_N, a divisor of PAGE, lies in one page.
Nobody writes page tables while a program runs, so they are read before `wait_for_previous`.
"""

import triton
import triton.language as tl

from et_moe.backends.ops import PAGE_SIZE

PAGE = tl.constexpr(PAGE_SIZE)
"""Tokens of a page."""

NO_TOP = tl.constexpr(-1e30)
"""The least maximum of a softmax whose first tokens may all be hidden: below that of any that is
not, and differences from it are numbers."""


@triton.jit
def load_page(pages_ptr, token, end):
    """The page of a token, int64, from the sequence's table; 0, and nothing is read, from `end` on.

    pages_ptr: int32 pointer to the table.
    """
    return tl.load(pages_ptr + token // PAGE, mask=token < end, other=0).to(tl.int64)


@triton.jit
def find_row(page, token, kv_head, KV_HEADS: tl.constexpr, DIM: tl.constexpr):
    """The element of a cache, int64, at which the row of a token and KV head begins."""
    place = token - token // PAGE * PAGE
    return ((page * KV_HEADS + kv_head) * PAGE + place) * DIM
