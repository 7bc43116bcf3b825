"""Folders that one process at a time writes to."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from et_moe.pipeline.config import ConfigError


@contextlib.contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Makes `directory` if need be; while the block runs, no other process gets into this one for
    the same folder. The lock is the kernel's (flock), and goes with the process.

    Raises:
        ConfigError: another process is writing there.
        OSError: the folder cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{directory}: another process is writing to this folder") from None
        yield
    finally:
        os.close(folder)
