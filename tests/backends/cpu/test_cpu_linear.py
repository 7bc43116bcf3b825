"""CPU kernels of linear layers, the embedding and INT8 quantization against their references."""

import pytest
import torch
from et_moe.backends import ops
from op_harness import Harness

TOKENS = (1, 2, 3, 15, 16, 17, 65)
DTYPES = (torch.float32, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", (40, 96))
def test_linear(harness: Harness, dtype: torch.dtype, columns: int) -> None:
    weight = normal(75, columns, dtype=dtype, seed=1)
    calls = [[normal(t, columns, dtype=dtype, seed=t), weight] for t in TOKENS]
    harness.compare("linear", calls)
