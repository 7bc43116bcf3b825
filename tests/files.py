"""Folders and disks of tests."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Stands in for a full disk: the kernel refuses bytes of a file beyond `limit`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
