"""Rows that are shifted by one, in calls of any length."""

import pytest
import torch

from et_moe.backends import ops

WIDTH = 5


def shift(x, state, slots, versions, num_tokens=None, each_row=False) -> torch.Tensor:
    """Of lists of numbers, by the op itself."""
    slots = torch.tensor(slots, dtype=torch.int32)
    count = None if num_tokens is None else torch.tensor(num_tokens)
    versions = torch.tensor(versions)
    return torch.ops.et_moe.token_shift(x, state, slots, versions, count, each_row)


@pytest.mark.parametrize("cuts", [(9,), (1, 8), (4, 4, 1), (2, 3, 4)])
def test_pieces_are_as_the_whole(cuts: tuple[int, ...]) -> None:
    x, state = torch.randn(9, WIDTH), torch.zeros(3, 2, WIDTH)
    rows = [shift(piece, state, [1], [0]) for piece in x.split(cuts)]
    assert torch.equal(torch.cat(rows), torch.cat((torch.zeros(1, WIDTH), x[:-1])))
    assert torch.equal(state[1, 0], x[-1]) and not state[[0, 2]].any() and not state[1, 1].any()


def test_each_row_leaves_a_version_that_a_sequence_goes_on_from() -> None:
    x, state = torch.randn(2, 3, WIDTH), torch.randn(4, 3, WIDTH)
    before = state.clone()
    found = shift(x.flatten(0, 1), state, [2, 0], [1, 2], [3, 2], True).view(2, 3, WIDTH)
    assert torch.equal(found[0], torch.stack((before[2, 1], *x[0, :2])))
    assert torch.equal(found[1, :2], torch.stack((before[0, 2], x[1, 0])))
    assert torch.equal(state[2], x[0]) and torch.equal(state[0, :2], x[1, :2])
    assert torch.equal(state[0, 2], before[0, 2]) and torch.equal(state[[1, 3]], before[[1, 3]])


def test_a_sequence_without_rows_changes_nothing() -> None:
    state = torch.randn(2, 2, WIDTH)
    before = state.clone()
    shift(torch.randn(2, WIDTH), state, [7, -1], [9, 9], [0, 0])
    assert torch.equal(state, before)


def test_what_is_refused() -> None:
    x, state = torch.randn(4, WIDTH), torch.zeros(1, 2, WIDTH)
    with pytest.raises(ValueError, match="versions: that of sequence 0 is 2, there are 2"):
        ops.token_shift(x, state, torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="4 rows of a sequence leave as many versions"):
        ops.token_shift(x, state, torch.tensor([0]), torch.tensor([0]), None, True)
