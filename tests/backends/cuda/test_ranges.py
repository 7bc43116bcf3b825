"""How the size that varies from call to call is cut into ranges, and what a range changes."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from et_moe.backends.cuda.compile import _check_any_size, _size_in
from et_moe.backends.cuda.ranges import BOUNDS, Range, split
from et_moe.backends.cuda.triton import tuning
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.cases.lookups import record_lookups
from et_moe.backends.cuda.triton.cases.table import OP_CASES
from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.common.tokens import DECODE_TOKENS, LINEAR_ROWS, is_decode
from et_moe.benchmarks.static.collect import all_entries, targets
from et_moe.pipeline.export import MAX_PREFILL_TOKENS

BATCHES = (4, 16, 64, 256)
"""Largest numbers of rows of the ranges of sequences that are decoded together."""


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [
        (1, 1, [1]),
        (1, 300, [1, 4, 16, 64, 256, 300]),
        (2, 3, [3]),
        (2, 16, [4, 16]),
        (2, 17, [4, 16, 17]),
        (2, 64, [4, 16, 64]),
        (2, 100, [4, 16, 64, 100]),
        (2, 2048, [4, 16, 64, 256, 2048]),
        (17, 20, [20]),
        (300, 400, [400]),
    ],
)
def test_split(low: int, high: int, ends: list[int]) -> None:
    ranges = split(low, high)
    assert [r.high for r in ranges] == ends
    assert [r.low for r in ranges] == [low, *(end + 1 for end in ends[:-1])]


@pytest.mark.parametrize("limits", split(2, 2048), ids=str)
def test_a_symbolic_size_counts_as_its_largest_value(limits: Range) -> None:
    size = _size_in(limits, ShapeEnv())
    assert isinstance(size, torch.SymInt) and not is_one(size)
    assert tuning.find_largest(size) == limits.high
    assert tuning.find_largest(9 * size + 1) == 9 * limits.high + 1
    assert is_decode(size) == is_decode(limits.high) == (limits.high <= DECODE_TOKENS)


def test_a_range_of_one_size_is_a_number() -> None:
    shape_env = ShapeEnv()
    assert _size_in(Range(1, 1), shape_env) == 1 and not shape_env.var_to_range


def test_conditions_on_the_size_are_refused() -> None:
    """A condition that every size of the range meets is not refused."""
    limits, shape_env = Range(17, 64), ShapeEnv()
    size = _size_in(limits, shape_env)
    assert size > 16 and size < 65
    _check_any_size(limits, shape_env)
    assert size > 20  # true of the largest size, which stands for all while code is made
    with pytest.raises(RuntimeError, match=r"not for all of Range\(low=17, high=64\): .*20"):
        _check_any_size(limits, shape_env)


def _program_sizes() -> set[int]:
    """The numbers of tokens with which programs look configurations up, in prefill and in
    decode."""
    return {1, *(r.high for r in split(2, MAX_PREFILL_TOKENS)), *BATCHES}


def test_every_tuned_entry_is_reached_by_a_program() -> None:
    """Each entry is reached with a shape of a published model, on one of the GPUs that programs are
    tuned for."""
    reached = set()
    for names in targets():
        with tuning.tuning_target(*names), record_lookups() as lookups, record_launches():
            for case in OP_CASES:
                several = len(case.tokens) > 1 and not case.name.endswith("_drafts")
                for tokens in _program_sizes() if several else case.tokens:
                    case.op(**case.arguments(tokens, torch.device("meta")))
        reached |= {(lookup.table, lookup.gpu, lookup.index) for lookup in lookups}
    assert sorted(all_entries() - reached) == []


def test_ranges_begin_where_kernels_change() -> None:
    assert BOUNDS[:3] == (1, LINEAR_ROWS, DECODE_TOKENS) and BOUNDS[1:] == BATCHES
