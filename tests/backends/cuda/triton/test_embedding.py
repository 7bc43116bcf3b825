"""The embedding's kernels against their eager references."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.embedding.op import embedding_w4, embedding_w8

TABLES = {
    "embedding_w8": (96, None, None),
    "embedding_w4/32": (96, 32, torch.bfloat16),
    "embedding_w4/64": (320, 64, torch.float16),
    "embedding_w4/128": (256, 128, torch.bfloat16),
}
"""Case -> columns, group size and dtype of the scales; the row of one is a power of two."""


@pytest.fixture(params=TABLES)
def case(request, device):
    """The op's functions, kernel and reference, and a table of 50 rows as they take it. One row is
    zero, and one has scales that are subnormal as float16."""
    columns, group_size, scale_dtype = TABLES[request.param]
    table = torch.randn(50, columns)
    table[2], table[3] = 0.0, table[3] * 1e-6
    if group_size is None:
        return embedding_w8, ops.embedding_w8, [t.to(device) for t in ops.quantize_w8(table)]
    weight, scale = ops.quantize_w4(table, group_size, scale_dtype=scale_dtype)
    return embedding_w4, ops.embedding_w4, [weight.to(device), scale.to(device), group_size]


@pytest.mark.parametrize("m", [1, 2, 3, 15, 16, 17, 31, 64, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(case, dtype, m, device):
    kernel, reference, table = case
    ids = torch.randint(0, 50, (m,), device=device)
    ids[:1] = 3
    got = kernel(ids, *table, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, reference(ids, *table, dtype))


def test_embedding_out_of_range(case, device):
    kernel, _, table = case
    ids = torch.tensor([-1, 50, 4, 2**40], device=device)
    got = kernel(ids, *table, torch.float32)
    assert got[[0, 1, 3]].eq(0).all() and got[2].ne(0).any()


def test_scales_of_other_groups_are_refused(device):
    weight, scale = (t.to(device) for t in ops.quantize_w4(torch.randn(50, 128), 32))
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    for group_size in (64, 16):
        with pytest.raises(ValueError, match=rf"scale \(50, 4\) .* group_size {group_size}"):
            embedding_w4(ids, weight, scale, group_size, torch.float32)
