"""The table of kernels against the ops that are declared."""

import inspect

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.table import TRITON_OPS


def parameters(function) -> list[tuple[str, object]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.kind is not p.KEYWORD_ONLY]


def test_every_op_has_kernels():
    declared = {name for name in ops.__all__ if hasattr(torch.ops.et_moe, name)}
    assert set(TRITON_OPS) == declared


@pytest.mark.parametrize("name", TRITON_OPS)
def test_parameters_are_those_of_the_contract(name):
    assert parameters(TRITON_OPS[name]) == parameters(getattr(ops, name))
