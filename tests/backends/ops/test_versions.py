"""States in versions: rows that are taken back leave nothing behind, and no copy is needed."""

import pytest
import torch
from sequences import make_pages, make_slots
from torch import Tensor

from et_moe.backends import ops

VERSIONS, ROWS, VALID, START = 4, 3, (3, 0, 2, 1), (3, 9, 0, 1)
"""Versions of the states; rows of each sequence; how many are valid; from which version sequences
go on. That of a sequence without valid rows may be anything."""
HEADS, DIM, CHANNELS = 2, 8, 48


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _layer(taps: int) -> tuple[Tensor, ...]:
    return (torch.randn(CHANNELS, taps), *torch.randn(2, HEADS), torch.ones(DIM))


def _states(slots: int, taps: int, versions: int) -> list[Tensor]:
    conv = torch.randn(slots, taps - 2 + versions, CHANNELS)
    return [conv, torch.randn(slots, versions, HEADS, DIM, DIM)]


def _version(states: list[Tensor], slot: int, version: int, taps: int) -> list[Tensor]:
    """The states of one version as a pool of one slot and no versions."""
    conv, recurrent = states
    rows = slice(version, version + taps - 1)
    return [conv[slot : slot + 1, rows].clone(), recurrent[slot : slot + 1, version].clone()]


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("each_row", [False, True])
def test_gated_delta_net(taps: int, each_row: bool) -> None:
    """Row by row without versions gives what the call leaves, and all else stays as it was."""
    slots, total = make_slots(4)
    layer, states = _layer(taps), _states(total, taps, VERSIONS)
    projected = torch.randn(4 * ROWS, CHANNELS + HEADS * DIM + 2 * HEADS)
    given = [state.clone() for state in states]
    places = (slots, 1e-6, torch.tensor(VALID), torch.tensor(START), each_row)
    out = ops.gated_delta_net(projected, *layer, *given, *places)
    touched = torch.zeros(total, VERSIONS, dtype=torch.bool)
    inputs = torch.zeros(given[0].shape[:2], dtype=torch.bool)
    for b, valid in enumerate(VALID):
        slot = int(slots[b])
        alone = _version(states, slot, START[b], taps) if valid else []
        for r in range(valid):
            row = projected[ROWS * b + r][None]
            one = ops.gated_delta_net(row, *layer, *alone, torch.zeros(1, dtype=torch.int32))
            torch.testing.assert_close(out[ROWS * b + r][None], one)
            if each_row or r == valid - 1:
                version = r if each_row else 0
                touched[slot, version] = True
                inputs[slot, version : version + taps - 1] = True
                left = _version(given, slot, version, taps)
                for got, expected in zip(left, alone, strict=True):
                    torch.testing.assert_close(got, expected)
    assert touched.any() and torch.equal(given[1][~touched], states[1][~touched])
    assert torch.equal(given[0][~inputs], states[0][~inputs])


def test_one_version_is_what_there_is_without() -> None:
    layer, states = _layer(4), _states(2, 4, 1)
    plain = [states[0].clone(), states[1].select(1, 0).clone()]
    projected = torch.randn(5, CHANNELS + HEADS * DIM + 2 * HEADS)
    slots = torch.tensor([1], dtype=torch.int32)
    expected = ops.gated_delta_net(projected, *layer, *plain, slots)
    got = ops.gated_delta_net(
        projected, *layer, *states, slots, versions=torch.zeros(1, dtype=torch.int64)
    )
    assert torch.equal(got, expected)
    assert torch.equal(states[0], plain[0]) and torch.equal(states[1].select(1, 0), plain[1])


@pytest.mark.parametrize(
    ("rows", "versions", "each_row", "message"),
    [
        (1, [4], False, "versions: that of sequence 0 is 4, there are 4"),
        (1, [-1], True, "versions: that of sequence 0 is -1, there are 4"),
        (5, [0], True, "5 rows of a sequence leave as many versions, there are 4"),
        (1, None, True, "each_row needs versions"),
    ],
)
def test_refuses_versions(rows: int, versions: list | None, each_row: bool, message: str) -> None:
    layer, states = _layer(4), _states(1, 4, VERSIONS)
    if versions is None:
        states = [states[0].narrow(1, 0, 3), states[1].select(1, 0)]
    else:
        versions = torch.tensor(versions)
    projected = torch.randn(rows, CHANNELS + HEADS * DIM + 2 * HEADS)
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.gated_delta_net(projected, *layer, *states, slots, versions=versions, each_row=each_row)


@pytest.mark.parametrize("first", [1, 3, 70])
def test_attention_never_reads_keys_before_the_first_token(first: int) -> None:
    """It is attention of a cache that begins there, but for the positions that rotate."""
    pages, total = make_pages([75])
    weights = (torch.randn(16), torch.randn(16), torch.rand(4))
    caches = [torch.randn(total, 2, ops.PAGE_SIZE, 16) for _ in range(2)]
    for cache in caches:
        for token in range(first):
            cache[pages[0, token // 64].long(), :, token % 64] = float("nan")
    qkv, position = torch.randn(4, 4 * 2 * 16 + 64), torch.tensor([71])
    out = ops.attention(qkv, *weights, *caches, pages, position, first_token=first)
    one = ops.attention(qkv[:1], *weights, *caches, pages, position, first_token=71)
    assert torch.isfinite(out).all()
    # The only key that the row sees is its own, so what comes out is its value.
    v, gate = qkv[0, -32:].view(2, 16), qkv[0, :128].view(4, 2, 16).select(1, 1)
    expected = v.repeat_interleave(2, 0) * gate.sigmoid()
    torch.testing.assert_close(one[0].view(4, 16), expected)


def test_attention_of_rows_in_front_of_the_first_token_is_nothing() -> None:
    pages, total = make_pages([8])
    weights = (torch.randn(16), torch.randn(16), torch.rand(4))
    caches = [torch.full((total, 1, ops.PAGE_SIZE, 16), float("nan")) for _ in range(2)]
    qkv = torch.randn(4, 2 * 2 * 16 + 32)
    out = ops.attention(qkv, *weights, *caches, pages, torch.tensor([0]), first_token=2)
    assert not out[:2].any() and torch.isfinite(out).all() and out[2:].all()
    assert torch.isfinite(caches[0][pages[0, 0].long(), :, :4]).all()


@pytest.mark.parametrize("first", [-1, 65])
def test_attention_refuses_a_first_token_that_no_page_has(first: int) -> None:
    cache = torch.zeros(1, 1, ops.PAGE_SIZE, 4)
    arguments = (torch.zeros(3, 16), torch.zeros(4), torch.zeros(4), torch.ones(1), cache, cache)
    pages = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"first_token: .* of 1 pages or their end, got {first}"):
        ops.attention(*arguments, pages, torch.tensor([0]), first_token=first)


def test_sample_draws_rows_as_they_are_drawn_alone() -> None:
    logits = torch.randn(6, 40) * 2
    parameters = [
        torch.tensor([0.8, 1.0]),
        torch.tensor([0, 9]),
        torch.tensor([0.9, 1.0]),
        torch.tensor([3, 4]),
        torch.tensor([7, 2**32 - 2]),
    ]
    tokens = ops.sample(logits, *parameters)
    assert tokens.shape == (2, 3)
    for b in range(2):
        for r in range(3):
            own = [p[b : b + 1] for p in parameters]
            own[-1] = own[-1] + r
            assert ops.sample(logits[3 * b + r][None], *own) == tokens[b, r]


def test_ops_are_traced_with_a_symbolic_number_of_sequences() -> None:
    """R, which does not vary, is then a number, as a program's outputs need it."""

    class Draw(torch.nn.Module):
        def forward(self, x, *parameters):
            x = torch.ops.et_moe.rms_norm(x, torch.zeros(12))
            return torch.ops.et_moe.sample(x.view(-1, 12), *parameters)

    dim = torch.export.Dim("sequences", min=2, max=64)
    dtypes = (torch.float32, torch.int64, torch.float32, torch.int64, torch.int64)
    given = (torch.zeros(4, 3, 12), *(torch.ones(4, dtype=d) for d in dtypes))
    shapes = {"x": {0: dim}, "parameters": tuple({0: dim} for _ in dtypes)}
    program = torch.export.export(Draw(), given, dynamic_shapes=shapes)
    (result,) = program.graph.output_node().args[0]
    assert result.meta["val"].shape[1] == 3 and isinstance(result.meta["val"].shape[1], int)
