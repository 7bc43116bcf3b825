"""Kernels run under Triton's interpreter on the CPU, or for real where there is a GPU."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from et_moe.backends.cuda.triton import tuning


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a kernel test live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def reconfigure(monkeypatch) -> Callable[..., None]:
    """`reconfigure(part, **changes)`: changes of the configurations of tables named with `part`."""

    def change(part: str, **changes: int) -> None:
        original = tuning.read_table

        def changed(name: str) -> tuning.Table:
            table = original(name)
            if part not in name:
                return table
            entries = {
                gpu: [tuning.Entry(entry.bound, entry.config | changes) for entry in rows]
                for gpu, rows in table.entries.items()
            }
            return tuning.Table(table.key, entries)

        monkeypatch.setattr(tuning, "read_table", changed)

    return change


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _round_to_bf16():
    """The interpreter truncates float32 to bf16; a GPU rounds to the nearest, ties to even."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return original(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", cast)
        yield
