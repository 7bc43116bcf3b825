"""A row, or a sequence, gets the same bits whatever else a call computes: alone and among others,
at any place of a batch, in any slot and any pages, by one thread and by two."""

from collections.abc import Sequence

import pytest
import torch
from op_harness import LINEAR_OPS, MOE_OPS, Harness, linear_weights, normal, quantized
from test_cpu_attention import attention_call
from test_cpu_gated_delta_net import conv_call, net_call, rule_call
from torch import Tensor

from et_moe.backends import ops

COUNT = 256
"""Rows, or sequences, of the largest call."""
SIZES = (1, 1, 2, 3, 4, 5, 6, 8, 17, 33, 100, 255)
"""How many of them the other calls take."""
VALID = (0, 7, 1, 3, 6, 12)
"""Valid rows of sequences of seven rows, in turn."""


class Choice:
    """Some sequences of a call in another order, with their states moved within the pools.

    Args:
        rows: which arguments have a row, or several, for each sequence.
        each: which arguments have an entry for each sequence.
        pools: which arguments hold slots or pages; places: which of `each` names them.
    """

    def __init__(
        self,
        args: Sequence,
        size: int,
        rows: Sequence[int],
        each: Sequence[int] = (),
        pools: Sequence[int] = (),
        places: int | None = None,
    ):
        self.before, self.pools = args, pools
        self.order = torch.randperm(COUNT)[:size]
        self.args = list(args)
        for i in rows:
            self.args[i] = self.rows(args[i])
        for i in each:
            self.args[i] = args[i][self.order]
        if places is None:
            return
        self.move = torch.randperm(args[pools[0]].shape[0])
        for i in pools:
            self.args[i] = args[i][self.move.argsort()]
        own = args[places][self.order].long()
        self.owned = own[own >= 0]
        moved = torch.where(own < 0, own, self.move[own])
        self.args[places] = moved.to(torch.int32)

    def rows(self, tensor: Tensor) -> Tensor:
        """Those of these sequences."""
        return tensor.unflatten(0, (COUNT, -1))[self.order].flatten(0, 1)

    def check(self, got: list[Tensor], together: list[Tensor]) -> None:
        """Compares with the results of the call of all sequences."""
        pools = len(self.pools)
        for i, one, all_of_them in zip(self.pools, got, together, strict=False):
            expected = self.before[i].clone()
            expected[self.owned] = all_of_them[self.owned]
            assert torch.equal(one[self.move], expected), f"{len(self.order)} sequences"
        for one, all_of_them in zip(got[pools:], together[pools:], strict=True):
            assert torch.equal(one, self.rows(all_of_them)), f"{len(self.order)} sequences"


def _check(harness: Harness, op: str, args: Sequence, *arguments) -> None:
    """Checks calls of some sequences of a call; see `Choice` for the further arguments."""
    torch.manual_seed(0)
    choices = [Choice(args, size, *arguments) for size in SIZES]
    calls = [args, *(choice.args for choice in choices)]
    one, two = harness.run(op, calls, threads=(1, 2))
    assert all(result.error == 0 for result in (*one, *two)), harness.log
    together = one[0].tensors
    assert all(torch.equal(*pair) for pair in zip(together, two[0].tensors, strict=True))
    for choice, *results in zip(choices, one[1:], two[1:], strict=True):
        for result in results:
            choice.check(result.tensors, together)


@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize("columns", [192, 256])
def test_linear(harness: Harness, op: str, columns: int, dtype: torch.dtype) -> None:
    weight = normal(75, columns, dtype=dtype, seed=1)
    weights = linear_weights(op, weight)
    norm, residual = normal(columns, dtype=dtype, seed=2), normal(COUNT, 75, dtype=dtype, seed=3)
    x = normal(COUNT, columns, dtype=dtype, seed=4)
    args = [x, *weights, norm, 1e-6, residual]
    _check(harness, op, args, (0, len(args) - 1))


def test_embedding(harness: Harness, dtype: torch.dtype) -> None:
    ids = torch.randint(50, (COUNT,), generator=torch.Generator().manual_seed(0))
    weight, scale = ops.quantize_w8(normal(50, 45, seed=1))
    _check(harness, "embedding_w8", [ids, weight, scale, dtype], (0,))
    weight, scale = quantized(normal(50, 96, seed=1), 32)
    _check(harness, "embedding_w4", [ids, weight, scale, 32, dtype], (0,))


@pytest.mark.parametrize("op", MOE_OPS)
def test_moe(harness: Harness, op: str, dtype: torch.dtype) -> None:
    """Rows choose among few experts, one of them twice, and skip some slots."""
    experts, hidden, inner = 6, 192, 160
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, experts, (COUNT, 4), generator=generator).to(torch.int32)
    routing = [torch.rand(COUNT, 4, generator=generator), ids]
    tables = normal(experts, 2 * inner, hidden, seed=1), normal(experts, hidden, inner, seed=2)
    tables = [(table * 0.1).to(dtype) for table in tables]
    if op.startswith("moe_w8"):
        tables = [part for table in tables for part in ops.quantize_w8(table)]
    elif op != "moe":
        tables = [part for table in tables for part in quantized(table, 32)]
    args = [normal(COUNT, hidden, dtype=dtype, seed=3), *tables, *routing]
    args += [32] if op.startswith("moe_w4") else []
    args.append(normal(COUNT, hidden, dtype=dtype, seed=4))
    first = 1 + len(tables)
    _check(harness, op, args, (0, first, first + 1, len(args) - 1))


@pytest.mark.parametrize("rows", [1, 3])
def test_router(harness: Harness, rows: int, dtype: torch.dtype) -> None:
    weight, norm = normal(44, 136, dtype=dtype, seed=1), normal(136, dtype=dtype, seed=2) * 0.1
    x = normal(COUNT * rows, 136, dtype=dtype, seed=3)
    num_tokens = torch.arange(COUNT) % (rows + 1)
    _check(harness, "moe_router", [x, norm, weight, 4, 1, 1e-6, num_tokens], (0,), (6,))


def _valid(rows: int) -> tuple[int, ...] | None:
    return None if rows == 1 else tuple(VALID[i % len(VALID)] for i in range(COUNT))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("heads", [(4, 2, 16, 4), (3, 1, 40, 5)])
def test_attention(harness: Harness, rows: int, heads: tuple, dtype: torch.dtype) -> None:
    positions = tuple(i * 37 % 200 for i in range(COUNT))
    args = attention_call(rows, heads, positions, dtype, _valid(rows))
    _check(harness, "attention", args, (0,), (7,) if rows == 1 else (7, 9), (4, 5), 6)


@pytest.mark.parametrize("rows", [1, 7])
def test_causal_conv1d(harness: Harness, rows: int, dtype: torch.dtype) -> None:
    args = conv_call(rows, 44, 4, dtype, _valid(rows), COUNT)
    _check(harness, "causal_conv1d", args, (0,), () if rows == 1 else (4,), (2,), 3)


@pytest.mark.parametrize("rows", [1, 7])
def test_gated_delta_rule(harness: Harness, rows: int, dtype: torch.dtype) -> None:
    args = rule_call(rows, (2, 4, 24, 40), dtype, _valid(rows), COUNT)
    _check(harness, "gated_delta_rule", args, range(5), () if rows == 1 else (7,), (5,), 6)


@pytest.mark.parametrize("rows", [1, 7])
def test_gated_delta_net(harness: Harness, rows: int, dtype: torch.dtype) -> None:
    args = net_call(rows, (2, 4, 24, 40), 4, dtype, _valid(rows), COUNT)
    _check(harness, "gated_delta_net", args, (0,), () if rows == 1 else (9,), (5, 6), 7)


def test_sample(harness: Harness) -> None:
    index = torch.arange(COUNT)
    temperature, top_p = index % 4 * 0.4, torch.where(index % 3 == 0, 1.0, 0.8)
    args = [normal(COUNT, 2100), temperature, index % 5 * 3, top_p, index, index * 7]
    _check(harness, "sample", args, range(6))


@pytest.mark.parametrize("op", ["attention", "gated_delta_net"])
def test_padding_changes_nothing(harness: Harness, op: str, dtype: torch.dtype) -> None:
    """A sequence gets the same bits in a call with padding and in one without."""
    if op == "attention":
        args, each = attention_call(9, (4, 2, 16, 4), (60, 3), dtype, (7, 9)), (6, 7, 9)
    else:
        args, each = net_call(9, (2, 4, 24, 40), 4, dtype, (7, 9), 2), (7, 9)
    alone = [a[:1] if i in each else a for i, a in enumerate(args)]
    alone[0] = args[0][:7]
    padded, plain = harness.run(op, [args, alone])[0]
    assert padded.error == plain.error == 0, harness.log
    assert torch.equal(padded.tensors[-1][:7], plain.tensors[-1])
