"""The kernel of linear layers for 5 to 16 rows: against the reference, and which calls take it."""

import pytest
import torch
from linear_weights import weights

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.table import TRITON_OPS

NAMES = ["linear_w4a8", "linear_w8a8"]
SMALL = {"BLOCK_N": 16, "MOST_ROWS": 16, "num_warps": 4}


def check(name, m, n, k, device, dtype=torch.float32, scale_dtype=torch.bfloat16):
    """Compares a call with norm and residual with the reference."""
    bundle, prepacked = weights(name, n, k, 128, device, scale_dtype)
    x = torch.randn(m, k, device=device).to(dtype)
    norm, residual = torch.randn(k).to(x), torch.randn(m, n).to(x)
    with record_launches(run=True) as launches:
        got = TRITON_OPS[name](x, *prepacked, norm_weight=norm, residual=residual)
    assert [x.name for x in launches] == ["quantize_rows_kernel", "_few_rows_kernel"]
    expected = getattr(ops, name)(x, *bundle, norm_weight=norm, residual=residual).double()
    limit = 1e-5 if dtype == torch.float32 else 3e-3
    assert (got.double() - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [5, 8, 9, 16])
@pytest.mark.parametrize("n,k", [(16, 256), (50, 512), (37, 2048), (33, 4096)])
def test_shapes(n, k, m, name, reconfigure, device):
    """The last program overlaps its neighbour unless 16 divides N."""
    reconfigure("_few_rows", **SMALL)
    check(name, m, n, k, device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_n,warps", [(16, 1), (16, 2), (32, 8), (64, 16)])
def test_configurations(block_n, warps, name, reconfigure, device):
    """Every warp has as many blocks of columns; there are four or eight here."""
    reconfigure("_few_rows", BLOCK_N=block_n, num_warps=warps)
    check(name, 6, 70, 1024, device)


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name, device):
    check(name, 7, 64, 512, device, torch.bfloat16)


def test_float16_scales(device):
    check("linear_w4a8", 7, 64, 512, device, scale_dtype=torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_others(name, reconfigure, device):
    """A row gets the same bits among 5 to 16 rows, wherever it stands.

    Under the interpreter, which adds as numpy does, this is only a hint that it holds on a GPU."""
    reconfigure("_few_rows", **SMALL)
    packed = weights(name, 48, 1024, 128, device)[1]
    x, residual = torch.randn(16, 1024, device=device), torch.randn(16, 48, device=device)
    x[3], x[4] = x[3] * 1e4, 0.0
    expected = TRITON_OPS[name](x, *packed, residual=residual)
    for count in range(5, 16):
        rows = torch.randperm(16)[:count].tolist()
        got = TRITON_OPS[name](x[rows], *packed, residual=residual[rows])
        assert torch.equal(got, expected[rows]), rows


@pytest.mark.parametrize(
    "name,n,k,group,most,launched",
    [
        ("linear_w4a8", 48, 512, 128, 8, "_few_rows_kernel"),
        ("linear_w4a8", 48, 512, 128, 7, "_gemm_kernel"),
        ("linear_w8a8", 48, 512, 128, 0, "_gemm_kernel"),
        ("linear_w4a8", 48, 512, 64, 16, "_gemm_kernel"),  # groups share a block of columns
        ("linear_w4a8", 48, 384, 128, 16, "_gemm_kernel"),  # not a power of two
        ("linear_w8a8", 15, 512, 128, 16, "_gemm_kernel"),  # less than a tile of columns
    ],
)
def test_which_kernel(name, n, k, group, most, launched, reconfigure, device):
    reconfigure("_few_rows", MOST_ROWS=most)
    bundle, prepacked = weights(name, n, k, group, device)
    x = torch.randn(8, k, device=device)
    with record_launches(run=True) as launches:
        got = TRITON_OPS[name](x, *prepacked)
    assert launches[-1].name == launched
    expected = getattr(ops, name)(x, *bundle)
    assert (got - expected).norm() < 1e-5 * expected.norm()
