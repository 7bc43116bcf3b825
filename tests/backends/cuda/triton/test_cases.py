"""The list of cases and candidates against the files that make them and the tables they fill."""

import importlib
from pathlib import Path

import pytest
import torch

from et_moe.backends.cuda import triton as kernels
from et_moe.backends.cuda.triton import tuning
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.cases.table import OP_CASES, TUNING_CANDIDATES
from et_moe.backends.cuda.triton.table import TRITON_OPS

FOLDER = Path(kernels.__file__).parent
TABLES = {path.stem for path in Path(tuning.__file__).parent.glob("*.json")}
WITHOUT_CASE = {"causal_conv1d"}
"""It is a part of `gated_delta_net`."""


def test_every_file_of_cases_is_entered():
    for path in FOLDER.glob("*/cases.py"):
        module = importlib.import_module(f"{kernels.__name__}.{path.parent.name}.cases")
        assert all(case in OP_CASES for case in getattr(module, "CASES", ()))
        assert set(getattr(module, "CANDIDATES", ())) <= set(TUNING_CANDIDATES)


def test_names_are_unique_and_ops_are_covered():
    names = [case.name for case in OP_CASES]
    assert len(names) == len(set(names))
    assert {case.op for case in OP_CASES} >= {
        function for name, function in TRITON_OPS.items() if name not in WITHOUT_CASE
    }


def test_tables_exist():
    assert set(TUNING_CANDIDATES) <= TABLES
    assert {table for case in OP_CASES for table in case.tables} == TABLES


@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case.name)
def test_launches(case):
    """A case names kernels and their parameters as they are."""
    seen = {}
    for m in case.tokens:
        with record_launches() as launches:
            case.op(**case.arguments(m, torch.device("meta")))
        seen |= {launch.name: launch.arguments for launch in launches}
    assert seen and case.gemms <= set(seen)
    for kernel, pointers in case.streams.items():
        assert set(pointers) <= set(seen[kernel])
