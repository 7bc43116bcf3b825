"""The CPU kernel of shifted rows."""

import pytest
import torch
from op_harness import Harness, normal

VERSIONS = 4


def call(
    rows: int,
    dtype: torch.dtype,
    valid: tuple[int, ...] | None,
    versions: tuple[int, ...],
    each_row: bool = False,
) -> list:
    count = len(versions)
    return [
        normal(rows * count, 37, dtype=dtype, seed=rows),
        normal(count + 2, VERSIONS, 37, dtype=dtype, seed=1),
        torch.arange(count, 0, -1, dtype=torch.int32),
        torch.tensor(versions),
        None if valid is None else torch.tensor(valid),
        each_row,
    ]


@pytest.mark.parametrize("each_row", [False, True])
def test_rows_of_sequences(harness: Harness, each_row: bool, dtype: torch.dtype) -> None:
    valid = ((3, 0, 1, 2), (4, 4, 9, 1))
    harness.compare("token_shift", [call(4, dtype, v, (3, 9, 0, 1), each_row) for v in valid[:1]])
    harness.compare("token_shift", [call(4, dtype, v, (3, 2, 0, 1), each_row) for v in valid])


def test_prompts(harness: Harness, dtype: torch.dtype) -> None:
    calls = [call(rows, dtype, (rows - 1,), (2,)) for rows in (2, 17, 65)]
    harness.compare("token_shift", calls)
    harness.compare("token_shift", [call(5, dtype, None, (3,))])


def test_what_is_refused(harness: Harness) -> None:
    args = call(4, torch.float32, (4, 1), (0, 4))
    harness.refuse("token_shift", args, "versions: that of sequence 1 is 4, there are 4")
    args = call(5, torch.float32, (5,), (0,), True)
    harness.refuse("token_shift", args, "versions: 5 rows of a sequence leave as many, there are 4")
    args = call(4, torch.float32, (4,), (0,))
    args[1] = args[1][..., :36].contiguous()
    harness.refuse("token_shift", args, "state: expected")
