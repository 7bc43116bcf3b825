"""Kernels run under Triton's interpreter where there is no GPU."""

import pytest
import triton
import triton_interpreter


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    if triton.knobs.runtime.interpret:
        triton_interpreter.install()
