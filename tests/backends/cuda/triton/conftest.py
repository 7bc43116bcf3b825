"""Kernels run under Triton's interpreter on the CPU, or for real where there is a GPU."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a kernel test live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
