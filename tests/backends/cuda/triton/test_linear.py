"""Dense linear kernels against their eager references."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton import linear
from et_moe.backends.cuda.triton.compile_case import record_launches

# Relative L2 error allowed against the reference with fp32 activations.
TOLERANCE = {"linear_w4a8": 1e-5, "linear_w4a16": 2e-4}
ROWS = [1, 2, 3, 15, 16, 17, 31, 64, 65, 129]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def weights(n: int, k: int, group: int, device: torch.device):
    """A bundle's weight and scale, and the same as the kernels take it."""
    packed, scale = ops.quantize_w4(torch.randn(n, k), group)
    packed, scale = packed.to(device), scale.to(device)
    return (packed, scale), linear.prepack_linear(packed, scale, group)


def run(name, x, n, group, device, **options):
    """(result, reference) of one op."""
    bundle, prepacked = weights(n, x.shape[1], group, device)
    got = getattr(linear, name)(x, *prepacked, group, **options)
    assert got.dtype == x.dtype
    return got, getattr(ops, name)(x, *bundle, group, **options)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("m", ROWS)
def test_rows(name, m, device):
    x = torch.randn(m, 256, device=device)
    got, expected = run(name, x, 48, 128, device)
    assert relative_error(got, expected) < TOLERANCE[name]


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("group", ops.GROUP_SIZES)
@pytest.mark.parametrize("k", [32, 64, 96, 128, 192, 256, 384, 512])
@pytest.mark.parametrize("m", [1, 3])
def test_columns_and_groups(name, m, k, group, device):
    if k % group:
        pytest.skip("not a shape of the format: the group size divides K")
    x = torch.randn(m, k, device=device)
    norm, residual = torch.randn(k, device=device), torch.randn(m, 40, device=device)
    got, expected = run(
        name, x, 40, group, device, norm_weight=norm, eps=1e-5, residual=residual
    )
    assert relative_error(got, expected) < TOLERANCE[name]
