"""INT8 quantization kernels against their eager references."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.table import TRITON_OPS

ROWS = [1, 2, 3, 15, 16, 17, 31, 64, 65, 129]


def check(name: str, x: torch.Tensor, tile: int) -> None:
    q, scale = TRITON_OPS[name](x, tile)
    expected_q, expected_scale = getattr(ops, name)(x, tile)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert q.shape == expected_q.shape and scale.shape == expected_scale.shape
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    different = (q != expected_q).float().mean().item()
    if name == "quantize_int8":
        assert different == 0  # bit for bit, ties included
    else:  # silu is computed to a few units in the last place
        assert different < 1e-3
        assert (q.int() - expected_q.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["quantize_int8", "silu_quantize_int8"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows(name, rows, device):
    check(name, 3 * torch.randn(rows, 256, device=device, dtype=torch.bfloat16), 128)


@pytest.mark.parametrize("name", ["quantize_int8", "silu_quantize_int8"])
@pytest.mark.parametrize("columns", [2, 32, 62, 64, 96, 130, 192, 320])
@pytest.mark.parametrize("tile", [32, 64, 96, 128])
def test_columns_and_tiles(name, columns, tile, device):
    check(name, torch.randn(3, columns, device=device), tile)


@pytest.mark.parametrize("name", ["quantize_int8", "silu_quantize_int8"])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-32, 1e-25, 1e4, 1e30])
def test_magnitudes(name, magnitude, device):
    if name == "silu_quantize_int8":
        magnitude = min(magnitude, 1e18)  # the product must stay finite
    check(name, magnitude * torch.randn(4, 256, device=device), 128)


@pytest.mark.parametrize("name", ["quantize_int8", "silu_quantize_int8"])
def test_zero_rows_and_tiles(name, device):
    x = torch.randn(4, 512, device=device)
    x[1] = 0
    x[2, 128:256] = 0
    check(name, x, 128)


def test_denormal_rows(device):
    check("quantize_int8", 1e-41 * torch.randn(3, 256, device=device), 128)


@pytest.mark.parametrize("name", ["quantize_int8", "silu_quantize_int8"])
def test_repeatable(name, device):
    x = torch.randn(65, 256, device=device, dtype=torch.bfloat16)
    first, second = (TRITON_OPS[name](x, 64) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_strided_input(device):
    x = torch.randn(8, 512, device=device)
    check("quantize_int8", x.narrow(1, 64, 256), 128)
