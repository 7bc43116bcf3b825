"""Ops of many sequences: each gets what it gets alone, and padding touches nothing."""

import pytest
import torch
from sequences import make_pages, make_slots, read_cache

from et_moe.backends import ops

LENGTHS = (0, 63, 64, 5)
"""Tokens that sequences have in their states before a call."""
VALID = (3, 0, 2, 1)
"""Valid rows of the sequences; each has three."""
ROWS = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_attention() -> None:
    pages, total = make_pages([length + ROWS for length in LENGTHS])
    weights = (torch.randn(16), torch.randn(16), torch.rand(4))
    pools = [torch.randn(total, 2, ops.PAGE_SIZE, 16) for _ in range(2)]
    qkv, positions = torch.randn(4 * ROWS, 4 * 2 * 16 + 64), torch.tensor(LENGTHS)
    given = [pool.clone() for pool in pools]
    out = ops.attention(qkv, *weights, *given, pages, positions, 1e-6, torch.tensor(VALID))
    touched = torch.zeros(total, dtype=torch.bool)
    for b, (length, valid) in enumerate(zip(LENGTHS, VALID, strict=True)):
        if valid == 0:
            continue
        own, rows = [pool.clone() for pool in pools], slice(ROWS * b, ROWS * b + valid)
        alone = ops.attention(qkv[rows], *weights, *own, pages[b : b + 1], positions[b : b + 1])
        assert torch.equal(out[rows], alone)
        for together, one in zip(given, own, strict=True):
            got, expected = (read_cache(x, pages[b], length + valid) for x in (together, one))
            assert torch.equal(got, expected)
        touched[pages[b, : (length + valid - 1) // ops.PAGE_SIZE + 1].long()] = True
    for together, before in zip(given, pools, strict=True):
        assert torch.equal(together[~touched], before[~touched])


def test_gated_delta_net() -> None:
    slots, total = make_slots(4)
    heads, dim, channels, taps = 2, 8, 48, 4
    net = (torch.randn(channels, taps), torch.randn(heads), torch.randn(heads), torch.ones(dim))
    states = [torch.randn(total, taps - 1, channels), torch.randn(total, heads, dim, dim)]
    projected = torch.randn(4 * ROWS, channels + heads * dim + 2 * heads)
    given = [state.clone() for state in states]
    out = ops.gated_delta_net(projected, *net, *given, slots, 1e-6, torch.tensor(VALID))
    expected = [state.clone() for state in states]
    for b, valid in enumerate(VALID):
        if valid:
            rows = slice(ROWS * b, ROWS * b + valid)
            alone = ops.gated_delta_net(projected[rows], *net, *expected, slots[b : b + 1])
            assert torch.equal(out[rows], alone)
    for got, wanted in zip(given, expected, strict=True):
        assert torch.equal(got, wanted)


def test_router_sees_padding_of_every_sequence() -> None:
    x, weight = torch.randn(4 * ROWS, 12), torch.randn(6, 12)
    _, weights, ids = ops.moe_router(
        x, torch.zeros(12), weight, 2, 1, num_tokens=torch.tensor(VALID)
    )
    _, all_weights, all_ids = ops.moe_router(x, torch.zeros(12), weight, 2, 1)
    valid = torch.tensor([row < count for count in VALID for row in range(ROWS)])
    assert torch.equal(ids[valid], all_ids[valid]) and (ids[~valid] == -1).all()
    assert torch.equal(weights[valid], all_weights[valid]) and (weights[~valid] == 0).all()


def test_sample_draws_each_row_with_its_own_parameters() -> None:
    logits = torch.randn(5, 40) * 2
    parameters = (
        torch.tensor([0.0, 1.0, 0.7, 3.0, 1.0]),
        torch.tensor([0, 5, 0, 0, 1]),
        torch.tensor([1.0, 1.0, 0.6, 1.0, 1.0]),
        torch.tensor([0, 1, 2, 3, 4]),
        torch.tensor([7, 0, 100, 3, 9]),
    )
    tokens = ops.sample(logits, *parameters)
    assert tokens.shape == (5, 1) and tokens.dtype == torch.int64
    alone = [ops.sample(logits[i : i + 1], *(p[i : i + 1] for p in parameters)) for i in range(5)]
    assert torch.equal(tokens, torch.cat(alone))
    assert tokens[0] == logits[0].argmax() and tokens[4] == logits[4].argmax()


def test_rows_must_be_shared_equally() -> None:
    x, state = torch.zeros(5, 2), torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match="5 rows cannot be shared equally by 2 sequences"):
        ops.causal_conv1d(x, torch.zeros(2, 4), state, torch.tensor([0, 1], dtype=torch.int32))
