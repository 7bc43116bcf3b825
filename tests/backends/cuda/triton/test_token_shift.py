"""The Triton kernel of shifted rows, against the reference."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.token_shift.op import token_shift

VERSIONS = 4


@pytest.mark.parametrize("width", [40, 1500])
@pytest.mark.parametrize(
    ("rows", "valid", "versions", "each_row"),
    [
        (4, (4, 0, 1, 3), (3, 99, 0, 1), True),
        (2, (2,), (1,), True),
        (4, None, (2, 0), True),
        (1, (1, 0, 1), (0, 5, 3), False),
        (19, (17,), (2,), False),
        (19, None, (0,), False),
    ],
)
def test_rows_and_state(
    rows: int, valid, versions, each_row: bool, width: int, device: torch.device
) -> None:
    count = len(versions)
    x = torch.randn(rows * count, width, dtype=torch.bfloat16)
    state = torch.randn(count + 2, VERSIONS, width, dtype=torch.bfloat16)
    slots = torch.arange(count, 0, -1, dtype=torch.int32)
    given = (slots, torch.tensor(versions), None if valid is None else torch.tensor(valid))
    expected = state.clone()
    wanted = ops.token_shift(x, expected, *given, each_row)
    place = [None if t is None else t.to(device) for t in (x, state, *given)]
    found = token_shift(*place, each_row)
    assert torch.equal(found.cpu(), wanted) and torch.equal(place[1].cpu(), expected)


def test_more_rows_than_versions(device: torch.device) -> None:
    x, state = torch.zeros(3, 8, device=device), torch.zeros(1, 2, 8, device=device)
    slot, version = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 rows of a sequence leave as many"):
        token_shift(x, state, slot.to(device), version.to(device), None, True)
