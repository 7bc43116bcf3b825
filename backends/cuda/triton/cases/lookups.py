"""Records which tuned configurations ops look up."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from et_moe.backends.cuda.triton import tuning


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One use of a tuning table.

    Attributes:
        size: by which the configuration was looked up.
        gpu, index: which entry it was.
    """

    table: str
    size: float
    gpu: str
    index: int


@contextlib.contextmanager
def record_lookups() -> Iterator[set[Lookup]]:
    """Collects what is looked up inside the block."""
    lookups: set[Lookup] = set()
    original = tuning.find_entry

    def recorder(name: str, size: float) -> tuple[str, int]:
        gpu, index = original(name, size)
        lookups.add(Lookup(name, size, gpu, index))
        return gpu, index

    with mock.patch.object(tuning, "find_entry", recorder):
        yield lookups
