"""Folders that one process at a time writes to, and that are found writable beforehand."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from et_moe.backends.atomic_file import check_writable
from et_moe.pipeline.config import ConfigError


@contextlib.contextmanager
def sole_writer(directory: Path, names: Iterable[str]) -> Iterator[None]:
    """Makes `directory` if need be; while the block runs, no other process gets into this one for
    the same folder. The lock is the kernel's (flock), and goes with the process. Folders that it
    made are removed if the block leaves them empty.

    Args:
        names: files of the folder that the block is going to write.

    Raises:
        ConfigError: another process is writing there.
        OSError: the folder cannot be made, or one of the files cannot be written.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        _make(directory)
        with _locked(directory):
            for name in names:
                check_writable(directory / name)
            yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty, and those above it
            for folder in made:
                folder.rmdir()


def _make(directory: Path) -> None:
    """Errors say what was tried: where no folder can be made, as in /proc, the kernel's word is
    that there is no such one."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exists = isinstance(error, FileExistsError)
        problem = "not a folder" if exists else f"cannot make this folder: {error.strerror}"
        raise OSError(error.errno, problem, str(directory)) from None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{directory}: another process is writing to this folder") from None
        yield
    finally:
        os.close(folder)
