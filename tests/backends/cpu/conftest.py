"""Fixtures of the CPU kernels' tests."""

from pathlib import Path

import pytest

from op_harness import Harness


@pytest.fixture
def harness(build_dir: Path, tmp_path: Path) -> Harness:
    return Harness(build_dir / "tests" / "backends" / "cpu" / "op_runner", tmp_path)
