"""What a killed process leaves beside its outputs, and who removes it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from et_moe.backends.atomic_file import atomic_file, atomic_folder, check_writable, write_file
from et_moe.backends.temporary_files import remove_stale


def leave_by_a_kill(make: Callable, path: Path) -> Path:
    """Debris of a process that is killed while it writes."""
    before = set(path.parent.iterdir())
    child = os.fork()
    if child == 0:
        with make(path) as made:
            if isinstance(made, Path):
                write_file(made / "file", b"x")
                atomic_file(made / "other").__enter__()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = set(path.parent.iterdir()) - before
    return left


@pytest.mark.parametrize("later", ["check_writable", "atomic_folder"])
@pytest.mark.parametrize("make", [atomic_file, atomic_folder])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, make, later: str) -> None:
    with atomic_file(tmp_path / "b"), atomic_folder(tmp_path / "c"):
        used = list(tmp_path.iterdir())
        left = leave_by_a_kill(make, tmp_path / "a")
        others = [left.with_suffix(".other"), left.with_name("et-moe-00000000-" + left.name[16:])]
        for other in others:  # not of this naming, or of another machine's
            other.touch()
        if later == "check_writable":
            check_writable(tmp_path / "new")
        else:
            with atomic_folder(tmp_path / "new"):
                assert not left.exists()
            (tmp_path / "new").rmdir()
        assert sorted(tmp_path.iterdir()) == sorted([*used, *others])


@pytest.mark.parametrize("make", [atomic_file, atomic_folder])
def test_what_is_in_use_is_never_taken_for_stale(tmp_path: Path, make) -> None:
    child = os.fork()
    if child == 0:
        while True:
            remove_stale(tmp_path)
    try:
        for i in range(300):
            with make(tmp_path / str(i)):
                pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert {p.name for p in tmp_path.iterdir()} == set(map(str, range(300)))
