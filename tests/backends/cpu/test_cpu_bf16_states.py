"""CPU kernels of the gated delta net whose recurrent state is bfloat16."""

import pytest
import torch
from op_harness import TOKENS, Harness
from test_cpu_gated_delta_net import MIXED, SHARES
from test_cpu_versions import MAKE, STATES, check_rows, versioned

from et_moe.backends.ops import PAGE_SIZE

OPS = ("gated_delta_rule", "gated_delta_net")
BEYOND_PAGES = (PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 3)


def call(op: str, *given) -> list:
    """A call as `MAKE` makes it, with a recurrent state of bfloat16."""
    args = MAKE[op](*given)
    args[STATES[op][-1]] = args[STATES[op][-1]].bfloat16()
    return args


@pytest.mark.parametrize("op", OPS)
def test_rows_of_one_sequence(harness: Harness, op: str, dtype: torch.dtype) -> None:
    lengths = sorted({*TOKENS, *BEYOND_PAGES})
    harness.compare(op, [call(op, n, dtype, (n - n // 9,), 1) for n in lengths])


@pytest.mark.parametrize("op", OPS)
def test_rows_of_sequences(harness: Harness, op: str, dtype: torch.dtype) -> None:
    harness.compare(op, [call(op, 9, dtype, valid, len(valid)) for valid in MIXED])
    harness.compare(op, [call(op, rows, dtype, None, count) for rows, count in SHARES])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("each_row", [False, True])
def test_versions(harness: Harness, op: str, each_row: bool, dtype: torch.dtype) -> None:
    counts = [((3, 0, 1, 2), (3, 9, 0, 1)), ((1,), (3,))]
    calls = [
        versioned(op, call(op, 4, dtype, valid, len(valid)), versions, each_row)
        for valid, versions in counts
    ]
    harness.compare(op, calls)


@pytest.mark.parametrize("op", OPS)
def test_rows_have_the_bits_that_they_have_alone(harness: Harness, op: str, dtype) -> None:
    check_rows(harness, op, call(op, 4, dtype, (4, 4), 2))


def left_by(harness: Harness, op: str, args: list, cuts: list[int]) -> list[torch.Tensor]:
    """The states and the rows of a sequence whose rows are fed in pieces of these lengths."""
    given = 5 if op == "gated_delta_rule" else 1
    step, rows, begin = list(args), [], 0
    for size in cuts:
        step[:given] = [a[begin : begin + size].contiguous() for a in args[:given]]
        *states, out = harness.run(op, [step])[0][0].tensors
        for i, state in zip(STATES[op][-len(states) :], states, strict=True):
            step[i] = state
        rows.append(out)
        begin += size
    return [*states, torch.cat(rows)]


@pytest.mark.parametrize("op", OPS)
def test_a_cut_behind_pages_changes_no_bit(harness: Harness, op: str, dtype: torch.dtype) -> None:
    """And one elsewhere does, since the state is rounded there."""
    args = call(op, 2 * PAGE_SIZE + 5, dtype)
    whole = left_by(harness, op, args, [len(args[0])])
    for cuts in ([PAGE_SIZE, PAGE_SIZE, 5], [2 * PAGE_SIZE, 5], [PAGE_SIZE, PAGE_SIZE + 5]):
        pieces = left_by(harness, op, args, cuts)
        assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True)), cuts
    elsewhere = left_by(harness, op, args, [PAGE_SIZE + 40, 29])
    assert not torch.equal(whole[-2], elsewhere[-2])
