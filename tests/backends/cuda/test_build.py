"""Compilers as child processes: what they say when they fail, and what is left of them."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from et_moe.backends.cuda.build import _run, scratch_folder
from et_moe.backends.cuda.errors import ToolchainError
from et_moe.pipeline.signals import Ended, ending_signals


def test_a_failure_says_what_the_compiler_said(tmp_path: Path) -> None:
    script = "import sys; sys.stderr.buffer.write(b'no \\xff header'); sys.exit(1)"
    with pytest.raises(ToolchainError, match=r"python.* failed on the host program:\nno . header"):
        _run([sys.executable, "-c", script], tmp_path)


def test_temporary_files_of_children_lie_in_the_scratch_folder() -> None:
    before = tempfile.gettempdir(), os.environ.get("TMPDIR")
    with pytest.raises(KeyError), scratch_folder():
        folder = Path(tempfile.gettempdir())
        _run(["mktemp", "-t", "ccXXXXXX.s"], folder)
        tempfile.mkstemp(suffix=".ptx")
        assert sorted(p.suffix for p in folder.iterdir()) == [".ptx", ".s"]
        raise KeyError
    assert not folder.exists()
    assert (tempfile.gettempdir(), os.environ.get("TMPDIR")) == before


def test_blocks_inside_a_block_share_its_folder() -> None:
    with scratch_folder() as outer:
        with scratch_folder() as inner:
            assert inner == outer and Path(tempfile.gettempdir()) == outer
        assert outer.exists()
    with scratch_folder() as next_one:
        assert next_one != outer and not outer.exists()


def _alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_signal_ends_the_compiler_and_what_it_started(tmp_path: Path) -> None:
    """Compilers start others, as g++ starts cc1plus, which would go on alone. The signal is sent
    when both run."""
    script = f"sleep 60 & echo $! $$ > {tmp_path}/ids; sleep 1; kill -TERM $PPID; wait"
    with pytest.raises(Ended, match="ended by SIGTERM"), ending_signals():
        _run(["sh", "-c", script], tmp_path)
    processes = [int(word) for word in (tmp_path / "ids").read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [p for p in processes if _alive(p)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert len(processes) == 2 and not left
