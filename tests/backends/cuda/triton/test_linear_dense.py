"""Kernels of linear layers with float weights against their eager reference."""

import pytest
import torch
from test_linear import relative_error

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.linear.dense import linear

DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
"""Of x, and of the weight: a head takes fp32 rows of a bf16 model."""


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 3e-3


def arguments(m, n, k, dtypes, device) -> dict:
    x, weight = torch.randn(m, k).to(dtypes[0]), torch.randn(n, k).to(dtypes[1])
    norm, residual = torch.randn(k).to(dtypes[1]), torch.randn(m, n).to(dtypes[0])
    values = {"x": x, "weight": weight, "norm_weight": norm, "residual": residual}
    return {name: value.to(device) for name, value in values.items()} | {"eps": 1e-5}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("k", [40, 256, 301, 768])
@pytest.mark.parametrize("m", [1, 3, 5, 70])
def test_rows_and_columns(m, k, dtypes, device):
    given = arguments(m, 50, k, dtypes, device)
    got = linear(**given)
    assert got.dtype == dtypes[0]
    assert relative_error(got, ops.linear(**given)) < tolerance(dtypes[0])


@pytest.mark.parametrize("n", [1, 2, 15, 33, 127])
@pytest.mark.parametrize("m", [1, 6])
def test_outputs(m, n, device):
    given = arguments(m, n, 256, DTYPES[1], device) | {"norm_weight": None, "residual": None}
    assert relative_error(linear(**given), ops.linear(**given)) < 1e-5


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "m,k,kernel",
    [
        (1, 512, "_dense_rows_kernel"),
        (LINEAR_ROWS, 512, "_dense_rows_kernel"),
        (LINEAR_ROWS + 1, 512, "_dense_gemm_kernel"),
        (1, 96, "_dense_gemm_kernel"),
        (1, 16384, "_dense_gemm_kernel"),
    ],
)
def test_launches(m, k, kernel, norm):
    given = arguments(m, 8, k, DTYPES[2], "meta")
    with record_launches() as launches:
        linear(**given if norm else given | {"norm_weight": None})
    assert [x.name for x in launches] == ["_norm_rows_kernel"] * norm + [kernel]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"BLOCK_N": 8, "num_warps": 2}])
def test_few_rows_do_not_depend_on_others(sizes, dtypes, reconfigure, device):
    """Rows get the bits that they get alone, in every configuration."""
    given = arguments(LINEAR_ROWS, 37, 512, dtypes, device)
    x, residual = given.pop("x"), given.pop("residual")
    alone = [linear(x[[i]], residual=residual[[i]], **given) for i in range(len(x))]
    alone = torch.cat(alone)
    reconfigure("linear_dense_rows", **sizes)
    for rows in ([0, 1], [2, 1, 0], [3, 2, 1, 0]):
        assert torch.equal(linear(x[rows], residual=residual[rows], **given), alone[rows])


def test_rows_of_a_gemm_do_not_depend_on_others(device):
    """In one configuration; another may add up products in another order."""
    given = arguments(70, 50, 301, DTYPES[0], device)
    x, residual, expected = given.pop("x"), given.pop("residual"), None
    for rows in (range(70), range(69, 40, -1)):
        rows = list(rows)
        got = linear(x[rows], residual=residual[rows], **given)
        expected = got if expected is None else expected
        assert torch.equal(got, expected[rows])


@pytest.mark.parametrize(
    "change,value",
    [
        ("weight", torch.zeros(50, 255)),
        ("weight", torch.zeros(50, 256, dtype=torch.float16)),
        ("norm_weight", torch.zeros(255)),
        ("residual", torch.zeros(2, 49)),
    ],
)
def test_wrong_arguments(change, value, device):
    given = arguments(2, 50, 256, DTYPES[0], device) | {change: value.to(device)}
    with pytest.raises(ValueError, match=change):
        linear(**given)
