"""Fixtures of the CPU kernels' tests."""

from pathlib import Path

import pytest
import torch
from op_harness import DTYPES, Harness


@pytest.fixture
def harness(build_dir: Path, tmp_path: Path) -> Harness:
    return Harness(build_dir / "tests" / "backends" / "cpu" / "op_runner", tmp_path)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of activations, caches and convolution states."""
    return request.param
