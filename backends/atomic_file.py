"""Files and folders that appear under their name only when they are whole.

Both are made beside their target under a random name, which nobody can have planted there, and
renamed when they are complete. `runner/files.cpp` does the same for the runner's outputs.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from et_moe.backends.temporary_files import lock, remove_stale, temporary_path


@contextlib.contextmanager
def atomic_file(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file for writing that becomes `path` when the block ends.

    Until then it is a temporary file beside `path`; when the block raises (a full disk included) it
    is removed and `path` stays as it was. A symbolic link is followed and its target replaced. What
    is no regular file (a FIFO, a device) is written to directly, and so are a file that is a mount
    point, which cannot be replaced, and the file that standard output or standard error already
    goes to.

    Args:
        path: the file; its folder must exist.
        mode: permissions. None for those of the file that is replaced, with its owner and group as
            far as the process may set them, or 0666 less the umask where there was no file.

    Raises:
        OSError: the file cannot be made, written or renamed; an error without a name gets `path`.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_path(target)
    with _naming(path, temporary):
        replaced = _stat(path)
        if replaced is not None and (descriptor := _in_place(path, replaced)) is not None:
            with open(descriptor, "wb") as file:
                yield file
            return
        if replaced is not None:
            _check_replaceable(path, target, os.rmdir)
        with _new_file(temporary, replaced, mode) as descriptor:
            with open(os.dup(descriptor), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)


def write_file(path: Path, data: bytes, mode: int | None = None) -> None:
    """Writes a whole file by way of `atomic_file`."""
    with atomic_file(path, mode) as file:
        file.write(data)


def check_writable(path: Path) -> None:
    """Raises OSError as `atomic_file` would for a file that cannot be written; leaves nothing.

    For what is written at the end of long work. What is written to directly is not opened, since a
    FIFO would wait for its reader. Temporary files that a killed process left there are removed.
    """
    target = Path(os.path.realpath(path))
    if (found := _stat(path)) is not None:
        if _known_descriptor(path, found) is not None:
            return
        _check_kind(path, found)
        if _stays(target, found):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return
        _check_replaceable(path, target, os.rmdir)
    temporary = temporary_path(target)
    with _naming(path, temporary), _new_file(temporary, None, None):
        temporary.unlink()
    remove_stale(target.parent)


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
    if target.is_dir():
        if _is_mount_point(target):
            raise OSError(errno.EBUSY, "is a mount point: name a folder in it", str(path))
        _check_replaceable(path, target, os.unlink)
    remove_stale(target.parent)
    # The name is known before the folder is made: a signal in between leaves nothing behind.
    temporary = temporary_path(target)
    with _naming(path, temporary), contextlib.ExitStack() as locked:
        try:
            locked.callback(os.close, _make_folder(temporary))
            if (replaced := _stat(target)) is not None:
                _take_over(temporary, replaced)
            yield temporary
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _make_folder(temporary: Path) -> int:
    """Makes a folder and locks it, until the descriptor is closed."""
    while True:
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):  # it was taken for stale already
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if lock(descriptor, temporary):
                return descriptor
            os.close(descriptor)


@contextlib.contextmanager
def _new_file(temporary: Path, replaced: os.stat_result | None, mode: int | None) -> Iterator[int]:
    """The descriptor of a new file with the permissions that `atomic_file` promises, and its lock:
    the file keeps that until it has its final name. If the block raises, the file is removed."""
    descriptor = None
    try:
        descriptor = _create(temporary, replaced, mode)
        yield descriptor
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


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
    if (known := _known_descriptor(path, found)) is not None:
        return os.dup(known)
    if not _stays(Path(os.path.realpath(path)), found):
        return None
    _check_kind(path, found)
    return os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOCTTY | os.O_CLOEXEC)


def _known_descriptor(path: Path, found: os.stat_result) -> int | None:
    """That with which this process has the file open already, so that it is written through it."""
    if named := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path)):
        if not _is_open_for_writing(int(named[1])):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(path))
        return int(named[1])
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(stream)) and _is_open_for_writing(stream):
                return stream
    return None


def _is_open_for_writing(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _stays(target: Path, found: os.stat_result) -> bool:
    """Whether what is there is written to as it is: what is no regular file, and a file that is
    mounted there, as containers do. Nobody may rename over a mount point (EBUSY), and the folder
    around it often is not the user's."""
    return not stat.S_ISREG(found.st_mode) or _is_mount_point(target)


def _is_mount_point(target: Path) -> bool:
    """Of a path without links. `os.path.ismount` sees only mounts of another file system."""
    with contextlib.suppress(OSError):  # without /proc nothing is known
        return _mount_of(target) != _mount_of(target.parent)
    return False


def _mount_of(path: Path) -> str:
    """The line of the kernel that says to which mount a path belongs."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next((line for line in lines if line.startswith("mnt_id:")), "")


def _check_kind(path: Path, found: os.stat_result) -> None:
    """Refuses what `open` would refuse only when the work is done."""
    if stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.ENXIO, "is a socket", str(path))
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _check_replaceable(path: Path, target: Path, remove: Callable[[Path], None]) -> None:
    """Raises PermissionError where `target` may not be replaced: it is another user's in a folder
    with the sticky bit, or immutable.

    Args:
        remove: `os.rmdir` for a file, `os.unlink` for a folder. They ask the kernel whether it may
            be removed before they see that it is not of their kind.
    """
    try:
        remove(target)
    except OSError as error:
        if error.errno == errno.EPERM:
            message = "it may not be replaced, being immutable or another user's in a sticky folder"
            raise PermissionError(errno.EPERM, message, str(path)) from None


def _create(temporary: Path, replaced: os.stat_result | None, mode: int | None) -> int:
    """A locked descriptor of a new file with the permissions that `atomic_file` promises."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    # Nobody else may open it before it has its final permissions.
    first_mode = 0o666 if mode is None and replaced is None else 0o600
    while not lock(descriptor := os.open(temporary, flags, first_mode), temporary):
        os.close(descriptor)
    if mode is not None:
        os.fchmod(descriptor, mode)
    elif replaced is not None:
        _take_over(descriptor, replaced)
    return descriptor


def _take_over(made: int | Path, replaced: os.stat_result) -> None:
    """Gives a new file or folder the owner, group and permissions of the one that it replaces."""
    for owner in (replaced.st_uid, -1):  # a group of its own a process may set, but no owner
        with contextlib.suppress(OSError):
            os.chown(made, owner, replaced.st_gid)
            break
    with contextlib.suppress(OSError):  # some file systems have no permissions
        os.chmod(made, stat.S_IMODE(replaced.st_mode) & ~stat.S_ISUID)
