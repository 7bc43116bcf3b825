"""The CPU kernel of attention against its reference."""

import pytest
import torch
from op_harness import TOKENS, Harness, normal
from sequences import make_pages

from et_moe.backends import ops

HEADS = ((4, 2, 16, 4), (2, 1, 32, 16), (3, 3, 24, 0), (6, 2, 40, 5))
"""Query heads, key-value heads, dimension, rotated pairs."""


def attention_call(
    rows: int,
    heads: tuple,
    positions: tuple[int, ...],
    dtype: torch.dtype,
    num_tokens: tuple[int, ...] | None = None,
    capacity: int = 0,
) -> list:
    """A call of one sequence for each position; capacity: tokens that each has pages for, if not
    just those of its valid rows."""
    query_heads, kv_heads, dim, half = heads
    valid = [min(rows, n) for n in num_tokens or [rows] * len(positions)]
    needed = [p + n if n else 0 for p, n in zip(positions, valid, strict=True)]
    pages, total = make_pages([max(capacity, n, 1) for n in needed], seed=rows)
    cache = (total, kv_heads, ops.PAGE_SIZE, dim)
    return [
        normal(len(positions) * rows, 2 * (query_heads + kv_heads) * dim, dtype=dtype, seed=rows),
        normal(dim, dtype=dtype, seed=1) * 0.2,
        normal(dim, dtype=dtype, seed=2) * 0.2,
        1e4 ** -(torch.arange(half) / max(half, 1)),
        normal(*cache, dtype=dtype, seed=3),
        normal(*cache, dtype=dtype, seed=4),
        pages,
        torch.tensor(positions),
        1e-6,
        None if num_tokens is None else torch.tensor(num_tokens),
    ]


@pytest.mark.parametrize("heads", HEADS)
def test_attention(harness: Harness, heads: tuple, dtype: torch.dtype) -> None:
    calls = [
        attention_call(t, heads, (p,), dtype, capacity=128) for t in TOKENS for p in (0, 31, 63)
    ]
    harness.compare("attention", calls)


def test_attention_over_several_pages(harness: Harness, dtype: torch.dtype) -> None:
    calls = [
        attention_call(t, HEADS[0], (p,), dtype, capacity=600)
        for t, p in ((1, 127), (1, 128), (1, 599), (65, 100), (300, 0), (300, 300))
    ]
    harness.compare("attention", calls)


@pytest.mark.parametrize("heads", HEADS)
def test_attention_of_sequences(harness: Harness, heads: tuple, dtype: torch.dtype) -> None:
    """The last page of a sequence holds one token, is full, or is one token short of it."""
    positions = (0, 64, 62, 63, 250, 5, 191)
    calls = [attention_call(rows, heads, positions, dtype) for rows in (1, 2, 7, 66)]
    harness.compare("attention", calls)


def test_attention_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    """Padding neither reaches the cache nor needs room in it."""
    calls = [attention_call(9, HEADS[3], (60,), dtype, (n,)) for n in (0, 1, 4, 5, 8, 9, 50)]
    harness.compare("attention", calls)


def test_attention_of_sequences_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    """Sequences without valid rows have positions and pages that lead nowhere."""
    positions = (10, -5, 55, 2**40, 128)
    mixed = ((9, 0, 4, 0, 1), (0, 0, 0, 0, 0), (0, 0, 12, 0, 9), (1, 0, 9, 0, 0))
    calls = [attention_call(9, HEADS[0], positions, dtype, valid, capacity=140) for valid in mixed]
    for args, valid in zip(calls, mixed, strict=True):
        args[6][torch.tensor(valid) == 0] = 2**31 - 1
    harness.compare("attention", calls)


def test_attention_with_large_scores(harness: Harness) -> None:
    args = attention_call(20, HEADS[0], (3,), torch.float32)
    args[1] = args[1] + 300.0
    harness.compare("attention", [args])


def test_attention_large_enough_for_threads(harness: Harness) -> None:
    heads = (8, 2, 128, 32)
    calls = [
        attention_call(t, heads, positions, torch.bfloat16, capacity=1024)
        for t, positions in ((1, (1023,)), (200, (0,)), (200, (777,)), (1, (800, 3, 1000)))
    ]
    harness.compare("attention", calls)


@pytest.mark.parametrize("position", [-1, 126, 2**31, 2**63 - 1, -(2**63)])
def test_attention_refuses_positions_outside_the_pages(harness: Harness, position: int) -> None:
    args = attention_call(3, HEADS[0], (7, 125), torch.float32)
    args[7][1] = position
    message = f"3 tokens from {position} on of sequence 1 do not fit 2 pages of 64"
    harness.refuse("attention", args, f"et_moe::attention: positions: {message}")


@pytest.mark.parametrize("page", [-1, 9, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("entry", [0, 2, 3])
def test_attention_refuses_pages_outside_the_cache(harness: Harness, entry: int, page: int) -> None:
    args = attention_call(3, HEADS[0], (7, 190), torch.float32, (2, 3), capacity=65)
    args[6][1, entry] = page
    message = f"entry {entry} of sequence 1 is {page}, the cache has 9 pages"
    harness.refuse("attention", args, f"et_moe::attention: pages: {message}")


def test_attention_refuses_a_negative_number_of_tokens(harness: Harness) -> None:
    args = attention_call(3, HEADS[0], (0, 0), torch.float32, (3, 3))
    args[9][1] = -2
    message = "num_tokens: expected at least 0, got -2 of sequence 1"
    harness.refuse("attention", args, f"et_moe::attention: {message}")


def test_attention_refuses_rows_that_cannot_be_shared(harness: Harness) -> None:
    args = attention_call(3, HEADS[0], (0, 0), torch.float32)
    args[0] = args[0][:5]
    message = "qkv: 5 rows cannot be shared equally by 2 sequences"
    harness.refuse("attention", args, f"et_moe::attention: {message}")
