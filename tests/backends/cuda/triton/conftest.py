"""Kernels run under Triton's interpreter on the CPU, or for real where there is a GPU."""

from collections.abc import Callable

import pytest
import torch

from et_moe.backends.cuda.triton import tuning


@pytest.fixture
def reconfigure(monkeypatch) -> Callable[..., None]:
    """`reconfigure(part, **changes)` changes configurations in the tables whose names contain
    `part`."""

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
