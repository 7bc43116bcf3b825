"""The CPU kernel of attention against its reference."""

import pytest
import torch
from op_harness import TOKENS, Harness, normal

HEADS = ((4, 2, 16, 4), (2, 1, 32, 16), (3, 3, 24, 0), (6, 2, 40, 5))
"""Query heads, key-value heads, dimension, rotated pairs."""


def _attention(
    tokens: int,
    heads: tuple,
    position: int,
    dtype: torch.dtype,
    capacity: int = 96,
    num_tokens: int | None = None,
) -> list:
    query_heads, kv_heads, dim, half = heads
    cache = (kv_heads, capacity, dim)
    return [
        normal(tokens, 2 * (query_heads + kv_heads) * dim, dtype=dtype, seed=tokens),
        normal(dim, dtype=dtype, seed=1) * 0.2,
        normal(dim, dtype=dtype, seed=2) * 0.2,
        1e4 ** -(torch.arange(half) / max(half, 1)),
        normal(*cache, dtype=dtype, seed=3),
        normal(*cache, dtype=dtype, seed=4),
        torch.tensor([position]),
        1e-6,
        None if num_tokens is None else torch.tensor([num_tokens]),
    ]


@pytest.mark.parametrize("heads", HEADS)
def test_attention(harness: Harness, heads: tuple, dtype: torch.dtype) -> None:
    calls = [_attention(t, heads, p, dtype) for t in TOKENS for p in (0, 31)]
    harness.compare("attention", calls)


def test_attention_over_several_key_blocks(harness: Harness, dtype: torch.dtype) -> None:
    calls = [
        _attention(t, HEADS[0], p, dtype, capacity=600)
        for t, p in ((1, 127), (1, 128), (1, 599), (65, 100), (300, 0), (300, 300))
    ]
    harness.compare("attention", calls)


def test_attention_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    """Padding neither reaches the cache nor needs room in it."""
    valid = (0, 1, 8, 9, 50)
    calls = [_attention(9, HEADS[3], 10, dtype, capacity=20, num_tokens=n) for n in valid]
    calls.append(_attention(9, HEADS[3], 15, dtype, capacity=20, num_tokens=5))
    harness.compare("attention", calls, valid=(*valid, 5))


def test_attention_with_large_scores(harness: Harness) -> None:
    args = _attention(20, HEADS[0], 3, torch.float32)
    args[1] = args[1] + 300.0
    harness.compare("attention", [args])


def test_attention_large_enough_for_threads(harness: Harness) -> None:
    calls = [
        _attention(t, (8, 2, 128, 32), p, torch.bfloat16, capacity=1024)
        for t, p in ((1, 1023), (200, 0), (200, 777))
    ]
    harness.compare("attention", calls)


@pytest.mark.parametrize("position", [-1, 94, 2**31, 2**63 - 1, -(2**63)])
def test_attention_refuses_positions_outside_the_cache(harness: Harness, position: int) -> None:
    harness.refuse(
        "attention",
        _attention(3, HEADS[0], position, torch.float32),
        f"et_moe::attention: position: 3 tokens from {position} on do not fit a cache of 96",
    )


def test_attention_refuses_a_negative_number_of_tokens(harness: Harness) -> None:
    harness.refuse(
        "attention",
        _attention(3, HEADS[0], 0, torch.float32, num_tokens=-2),
        "et_moe::attention: num_tokens: expected at least 0, got -2",
    )
