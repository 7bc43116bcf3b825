"""Files and folders that appear under their name only when they are whole.

Both are made beside their target under a random name, which nobody can have planted there, and
renamed when they are complete. `runner/files.cpp` does the same for the runner's outputs.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file for writing that becomes `path` when the block ends.

    Until then it is a temporary file beside `path`; when the block raises (a full disk included) it
    is removed and `path` stays as it was. A symbolic link is followed and its target replaced. What
    is no regular file (a FIFO, a device) is written to directly, and so is the file that standard
    output or standard error already goes to.

    Args:
        path: the file; its folder must exist.
        mode: permissions. None for those of the file that is replaced, with its owner and group as
            far as the process may set them, or 0666 less the umask where there was no file.

    Raises:
        OSError: the file cannot be made, written or renamed; an error without a name gets `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    with _naming(path, temporary):
        replaced = _stat(path)
        if replaced is not None and (descriptor := _in_place(path, replaced)) is not None:
            with open(descriptor, "wb") as file:
                yield file
            return
        try:
            with open(_create(temporary, replaced, mode), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_file(path: Path, data: bytes, mode: int | None = None) -> None:
    """Writes a whole file by way of `atomic_file`."""
    with atomic_file(path, mode) as file:
        file.write(data)


def check_writable(path: Path) -> None:
    """Raises OSError as `atomic_file` would for a file that cannot be written; leaves nothing.

    For what is written at the end of long work. What is no regular file is not opened, since a FIFO
    would wait for its reader.
    """
    found = _stat(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    temporary = _temporary(Path(os.path.realpath(path)))
    with _naming(path, temporary):
        try:
            os.close(_create(temporary, None, None))
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Makes a folder that becomes `path` when the block ends; yields its temporary name.

    When the block raises it is removed with all that it holds. A symbolic link is followed.

    Args:
        path: must not exist, or be an empty folder, whose permissions the new one gets.

    Raises:
        OSError: the folder cannot be made or renamed; the error names `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    with _naming(path, temporary):
        try:
            temporary.mkdir()
            if (replaced := _stat(target)) is not None:
                _take_over(temporary, replaced)
            yield temporary
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _temporary(target: Path) -> Path:
    # The name is known before the file is made: a signal in between leaves nothing behind.
    return target.with_name(f"et-moe-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Lets errors name `path` that name nothing or a temporary file, which the user never sees."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is None or not nameless:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _in_place(path: Path, found: os.stat_result) -> int | None:
    """A descriptor of what is to be written to as it is, or None for what is to be replaced."""
    if named := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path)):
        return os.dup(int(named[1]))
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(stream)):
                return os.dup(stream)
    if stat.S_ISREG(found.st_mode):
        return None
    return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def _create(temporary: Path, replaced: os.stat_result | None, mode: int | None) -> int:
    """A descriptor of a new file with the permissions that `atomic_file` promises."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if mode is None and replaced is None:
        return os.open(temporary, flags, 0o666)
    # Nobody else may open it before it has its final permissions.
    descriptor = os.open(temporary, flags, 0o600)
    if mode is None:
        _take_over(descriptor, replaced)
    else:
        os.fchmod(descriptor, mode)
    return descriptor


def _take_over(made: int | Path, replaced: os.stat_result) -> None:
    """Gives a new file or folder the owner, group and permissions of the one that it replaces."""
    for owner in (replaced.st_uid, -1):  # a group of its own a process may set, but no owner
        with contextlib.suppress(OSError):
            os.chown(made, owner, replaced.st_gid)
            break
    with contextlib.suppress(OSError):  # some file systems have no permissions
        os.chmod(made, stat.S_IMODE(replaced.st_mode) & ~stat.S_ISUID)
