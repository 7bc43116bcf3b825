"""Fixtures that every test folder shares."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The CMake build folder that holds the runner and the C++ test tools."""
    path = Path(os.environ.get("ET_MOE_BUILD_DIR", REPO / "build"))
    if not path.is_dir():
        pytest.fail(f"{path}: no build found; run scripts/setup.sh or set ET_MOE_BUILD_DIR")
    return path
