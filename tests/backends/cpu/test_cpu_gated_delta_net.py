"""CPU kernels of the gated delta net against their references."""

import pytest
import torch
from op_harness import TOKENS, Harness, normal
from sequences import make_slots

HEADS = ((2, 2, 16, 32), (1, 2, 32, 16), (2, 6, 24, 40), (1, 1, 8, 20))
"""Key heads, value heads, key and value dimension: 1, 2 and 3 value heads per key head."""
MIXED = ((9, 0, 1, 4), (0, 0), (3, 2, 0), (0, 12, 9, 2, 8))
"""Valid rows of sequences of nine rows."""
SHARES = ((1, 2), (1, 7), (3, 5))
"""Rows of each sequence, sequences."""


def _places(sequences: int, num_tokens: tuple[int, ...] | None) -> tuple[int, list]:
    """How many slots a pool has, and the arguments `slots` and `num_tokens`."""
    slots, total = make_slots(sequences, seed=sequences)
    return total, [slots, None if num_tokens is None else torch.tensor(num_tokens)]


def conv_call(
    rows: int,
    channels: int,
    taps: int,
    dtype: torch.dtype,
    num_tokens: tuple[int, ...] | None = None,
    sequences: int = 1,
) -> list:
    pool, places = _places(sequences, num_tokens)
    return [
        normal(sequences * rows, channels, dtype=dtype, seed=rows),
        normal(channels, taps, dtype=dtype, seed=1),
        normal(pool, taps - 1, channels, dtype=dtype, seed=2),
        *places,
    ]


def rule_call(
    rows: int,
    heads: tuple,
    dtype: torch.dtype,
    num_tokens: tuple[int, ...] | None = None,
    sequences: int = 1,
) -> list:
    key_heads, value_heads, key_dim, value_dim = heads
    pool, places = _places(sequences, num_tokens)
    tokens = sequences * rows
    return [
        normal(tokens, key_heads, key_dim, dtype=dtype, seed=1),
        normal(tokens, key_heads, key_dim, dtype=dtype, seed=2),
        normal(tokens, value_heads, value_dim, dtype=dtype, seed=3),
        -normal(tokens, value_heads, seed=4).abs(),
        normal(tokens, value_heads, seed=5).sigmoid(),
        normal(pool, value_heads, key_dim, value_dim, seed=6),
        *places,
    ]


def net_call(
    rows: int,
    heads: tuple,
    taps: int,
    dtype: torch.dtype,
    num_tokens: tuple[int, ...] | None = None,
    sequences: int = 1,
) -> list:
    key_heads, value_heads, key_dim, value_dim = heads
    values = value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    pool, (slots, count) = _places(sequences, num_tokens)
    return [
        normal(sequences * rows, channels + values + 2 * value_heads, dtype=dtype, seed=1),
        normal(channels, taps, dtype=dtype, seed=2),
        normal(value_heads, dtype=dtype, seed=3),
        normal(value_heads, dtype=dtype, seed=4),
        1 + 0.1 * normal(value_dim, dtype=dtype, seed=5),
        normal(pool, taps - 1, channels, dtype=dtype, seed=6),
        normal(pool, value_heads, key_dim, value_dim, seed=7),
        slots,
        1e-6,
        count,
    ]


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_causal_conv1d(harness: Harness, taps: int, dtype: torch.dtype) -> None:
    harness.compare("causal_conv1d", [conv_call(t, 44, taps, dtype) for t in TOKENS])


def test_causal_conv1d_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    valid = (0, 1, 2, 3, 5, 9, 100)
    calls = [conv_call(9, 24, 4, dtype, (n,)) for n in valid]
    for args in calls:
        args[1] = args[1].float()
    harness.compare("causal_conv1d", calls)


def test_causal_conv1d_of_sequences(harness: Harness, dtype: torch.dtype) -> None:
    harness.compare(
        "causal_conv1d", [conv_call(9, 44, 4, dtype, valid, len(valid)) for valid in MIXED]
    )
    calls = [conv_call(rows, 44, 4, dtype, None, count) for rows, count in SHARES]
    harness.compare("causal_conv1d", calls)


@pytest.mark.parametrize("heads", HEADS)
def test_gated_delta_rule(harness: Harness, heads: tuple, dtype: torch.dtype) -> None:
    harness.compare("gated_delta_rule", [rule_call(t, heads, dtype) for t in TOKENS])


def test_gated_delta_rule_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    harness.compare(
        "gated_delta_rule", [rule_call(7, HEADS[1], dtype, (n,)) for n in (0, 1, 6, 7, 8)]
    )


def test_gated_delta_rule_of_sequences(harness: Harness, dtype: torch.dtype) -> None:
    harness.compare(
        "gated_delta_rule", [rule_call(9, HEADS[1], dtype, valid, len(valid)) for valid in MIXED]
    )
    calls = [rule_call(rows, HEADS[2], dtype, None, count) for rows, count in SHARES]
    harness.compare("gated_delta_rule", calls)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("taps", [2, 4])
def test_gated_delta_net(harness: Harness, heads: tuple, taps: int, dtype: torch.dtype) -> None:
    harness.compare("gated_delta_net", [net_call(t, heads, taps, dtype) for t in TOKENS])


def test_gated_delta_net_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    calls = [net_call(7, HEADS[2], 4, dtype, (n,)) for n in (0, 1, 2, 6, 7, 8)]
    harness.compare("gated_delta_net", calls)


def test_gated_delta_net_of_sequences(harness: Harness, dtype: torch.dtype) -> None:
    harness.compare(
        "gated_delta_net", [net_call(9, HEADS[2], 4, dtype, valid, len(valid)) for valid in MIXED]
    )
    calls = [net_call(rows, HEADS[2], 4, dtype, None, count) for rows, count in SHARES]
    harness.compare("gated_delta_net", calls)


def test_gated_delta_net_with_parameters_of_another_dtype(harness: Harness) -> None:
    args = net_call(5, HEADS[0], 4, torch.bfloat16)
    args[1:5] = [a.float() for a in args[1:5]]
    harness.compare("gated_delta_net", [args])


def test_gated_delta_net_large_enough_for_threads(harness: Harness) -> None:
    heads = (4, 8, 128, 128)
    calls = [net_call(t, heads, 4, torch.float32, None, n) for t, n in ((1, 1), (20, 1), (1, 3))]
    harness.compare("gated_delta_net", calls)


def test_gated_delta_net_token_by_token(harness: Harness) -> None:
    """One call with all tokens gives the same results, and leaves the same state, as a call per
    token."""
    together = net_call(6, HEADS[1], 4, torch.float32)
    state, recurrent, out = harness.run("gated_delta_net", [together])[0][0].tensors
    step, rows = list(together), []
    for t in range(6):
        step[0] = together[0][t : t + 1]
        step[5], step[6], row = harness.run("gated_delta_net", [step])[0][0].tensors
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows), out)
    torch.testing.assert_close(step[5], state)
    torch.testing.assert_close(step[6], recurrent)


_CALLS = {
    "causal_conv1d": (lambda valid: conv_call(3, 24, 4, torch.float32, valid, 4), 3),
    "gated_delta_rule": (lambda valid: rule_call(3, HEADS[0], torch.float32, valid, 4), 6),
    "gated_delta_net": (lambda valid: net_call(3, HEADS[0], 4, torch.float32, valid, 4), 7),
}
"""Op -> how to make a call of four sequences of three rows, and which argument is `slots`."""


@pytest.mark.parametrize("op", _CALLS)
@pytest.mark.parametrize("slot", [-1, 6, 2**31 - 1, -(2**31)])
def test_refuses_slots_outside_the_pool(harness: Harness, op: str, slot: int) -> None:
    """Only those of sequences without valid rows may be anything."""
    make, at = _CALLS[op]
    args = make((3, 0, 1, 2))
    args[at][2] = slot
    message = f"et_moe::{op}: slots: that of sequence 2 is {slot}, there are 6"
    harness.refuse(op, args, message)
    args = make((3, 3, 0, 2))
    args[at][2] = slot
    harness.compare(op, [args])


@pytest.mark.parametrize("op", _CALLS)
def test_refuses_rows_and_counts_that_make_no_sequences(harness: Harness, op: str) -> None:
    make, at = _CALLS[op]
    message = f"et_moe::{op}: num_tokens: expected at least 0, got -2 of sequence 3"
    harness.refuse(op, make((3, 3, 0, -2)), message)
    args = make(None)
    args[at] = args[at].repeat(2)[:5]
    harness.refuse(op, args, ": 12 rows cannot be shared equally by 5 sequences")
