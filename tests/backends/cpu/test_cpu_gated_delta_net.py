"""CPU kernels of the gated delta net against their references."""

import pytest
import torch
from op_harness import TOKENS, Harness, normal

HEADS = ((2, 2, 16, 32), (1, 2, 32, 16), (2, 6, 24, 40), (1, 1, 8, 20))
"""Key heads, value heads, key and value dimension: 1, 2 and 3 value heads per key head."""


def _rule(tokens: int, heads: tuple, dtype: torch.dtype, num_tokens: int | None = None) -> list:
    key_heads, value_heads, key_dim, value_dim = heads
    return [
        normal(tokens, key_heads, key_dim, dtype=dtype, seed=1),
        normal(tokens, key_heads, key_dim, dtype=dtype, seed=2),
        normal(tokens, value_heads, value_dim, dtype=dtype, seed=3),
        -normal(tokens, value_heads, seed=4).abs(),
        normal(tokens, value_heads, seed=5).sigmoid(),
        normal(value_heads, key_dim, value_dim, seed=6),
        None if num_tokens is None else torch.tensor([num_tokens]),
    ]


def _net(
    tokens: int, heads: tuple, taps: int, dtype: torch.dtype, num_tokens: int | None = None
) -> list:
    key_heads, value_heads, key_dim, value_dim = heads
    values = value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    return [
        normal(tokens, channels + values + 2 * value_heads, dtype=dtype, seed=1),
        normal(channels, taps, dtype=dtype, seed=2),
        normal(value_heads, dtype=dtype, seed=3),
        normal(value_heads, dtype=dtype, seed=4),
        1 + 0.1 * normal(value_dim, dtype=dtype, seed=5),
        normal(taps - 1, channels, dtype=dtype, seed=6),
        normal(value_heads, key_dim, value_dim, seed=7),
        1e-6,
        None if num_tokens is None else torch.tensor([num_tokens]),
    ]


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_causal_conv1d(harness: Harness, taps: int, dtype: torch.dtype) -> None:
    weight = normal(44, taps, dtype=dtype, seed=1)
    state = normal(taps - 1, 44, dtype=dtype, seed=2)
    calls = [[normal(t, 44, dtype=dtype, seed=t), weight, state] for t in TOKENS]
    harness.compare("causal_conv1d", calls)


def test_causal_conv1d_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    weight, state = normal(24, 4, seed=1), normal(3, 24, dtype=dtype, seed=2)
    valid = (0, 1, 2, 3, 5, 9, 100)
    calls = [[normal(9, 24, dtype=dtype, seed=3), weight, state, torch.tensor([n])] for n in valid]
    harness.compare("causal_conv1d", calls, valid=valid)


@pytest.mark.parametrize("heads", HEADS)
def test_gated_delta_rule(harness: Harness, heads: tuple, dtype: torch.dtype) -> None:
    harness.compare("gated_delta_rule", [_rule(t, heads, dtype) for t in TOKENS])


def test_gated_delta_rule_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    valid = (0, 1, 6, 7, 8)
    calls = [_rule(7, HEADS[1], dtype, num_tokens=n) for n in valid]
    harness.compare("gated_delta_rule", calls, valid=valid)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("taps", [2, 4])
def test_gated_delta_net(harness: Harness, heads: tuple, taps: int, dtype: torch.dtype) -> None:
    harness.compare("gated_delta_net", [_net(t, heads, taps, dtype) for t in TOKENS])


def test_gated_delta_net_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    valid = (0, 1, 2, 6, 7, 8)
    calls = [_net(7, HEADS[2], 4, dtype, num_tokens=n) for n in valid]
    harness.compare("gated_delta_net", calls, valid=valid)


def test_gated_delta_net_with_parameters_of_another_dtype(harness: Harness) -> None:
    args = _net(5, HEADS[0], 4, torch.bfloat16)
    args[1:5] = [a.float() for a in args[1:5]]
    harness.compare("gated_delta_net", [args])


def test_gated_delta_net_large_enough_for_threads(harness: Harness) -> None:
    heads = (4, 8, 128, 128)
    harness.compare("gated_delta_net", [_net(t, heads, 4, torch.float32) for t in (1, 20)])


def test_gated_delta_net_token_by_token(harness: Harness) -> None:
    """One call with all tokens gives the same results, and leaves the same state, as a call per
    token."""
    together = _net(6, HEADS[1], 4, torch.float32)
    state, recurrent, out = harness.run("gated_delta_net", [together])[0][0].tensors
    step, rows = list(together), []
    for t in range(6):
        step[0] = together[0][t : t + 1]
        step[5], step[6], row = harness.run("gated_delta_net", [step])[0][0].tensors
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows), out)
    torch.testing.assert_close(step[5], state)
    torch.testing.assert_close(step[6], recurrent)
