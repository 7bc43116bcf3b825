"""Files that appear under their name only when they are whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, for writing and reading back.

    When the block ends it is flushed to disk and renamed to `path`; when the block raises (a full
    disk included) it is removed and `path` stays as it was. An OSError without a name gets `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    file = temporary.open("wb+")
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file by way of `atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)
