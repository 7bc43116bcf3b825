"""Temporary files and folders: their names, and the end of those whose process was killed.

A process locks (flock) each that it makes, and the kernel takes the lock away with the process,
however it ends. Such a lock says something to the processes of one kernel only, so the name says
which one made it. What bears the name of this kernel and is not locked is stale.
`runner/temporary_files.cpp` does the same.
"""

import contextlib
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path


def temporary_path(target: Path) -> Path:
    """A name beside `target` that nobody can have planted something at."""
    return target.with_name(f"{_prefix()}{secrets.token_hex(8)}.tmp")


def lock(descriptor: int, path: Path) -> bool:
    """Locks what was just made at `path`, until its descriptors are closed.

    Returns:
        Whether it is there still: another process may have taken it for stale before it was locked.
    """
    with contextlib.suppress(OSError):  # where there are no locks, nothing is ever taken for stale
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_stale(folder: Path) -> None:
    """Removes this user's temporary files and folders whose process has ended. Whatever cannot be
    removed stays, without an error."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(_prefix()) and name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    _remove_if_stale(folder / name)


def _prefix() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    # Where the kernel has no name, files have one that no process looks for.
    named = re.match(r"[0-9a-f]{8}", boot)
    return f"et-moe-{named[0] if named else secrets.token_hex(8)}-"


def _remove_if_stale(path: Path) -> None:
    """Raises OSError where it is in use or cannot be removed."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(found.st_mode):
            path.unlink()
        elif stat.S_ISDIR(found.st_mode):
            # Not recursively, since no folder in it would be of this project's making.
            for name in os.listdir(descriptor):
                os.unlink(name, dir_fd=descriptor)
            path.rmdir()
    finally:
        os.close(descriptor)
