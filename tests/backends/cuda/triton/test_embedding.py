"""The embedding's kernel against its eager reference."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.embedding.op import embedding_w8


@pytest.mark.parametrize("m", [1, 2, 3, 15, 16, 17, 31, 64, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype, m, device):
    weight, scale = (t.to(device) for t in ops.quantize_w8(torch.randn(50, 96)))
    ids = torch.randint(0, 50, (m,), device=device)
    got = embedding_w8(ids, weight, scale, dtype)
    expected = ops.embedding_w8(ids, weight, scale, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_embedding_out_of_range(device):
    weight, scale = (t.to(device) for t in ops.quantize_w8(torch.randn(50, 96)))
    ids = torch.tensor([-1, 50, 3, 2**40], device=device)
    got = embedding_w8(ids, weight, scale, torch.float32)
    assert got[[0, 1, 3]].eq(0).all() and got[2].ne(0).any()
