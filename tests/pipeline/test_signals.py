"""Signals that ask a command to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from et_moe.pipeline.signals import Ended, ending_signals

SIGNALS = [signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_raises_and_later_ones_wait_for_the_end(number: int) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    cleaned = []
    with pytest.raises(Ended, match=f"ended by {number.name}") as ended, ending_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            for other in SIGNALS:
                os.kill(os.getpid(), other)
            cleaned.append(True)
    assert cleaned and ended.value.exit_code == 128 + number
    assert not isinstance(ended.value, Exception)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_nohup_is_obeyed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Ended):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_leaves_nothing(tmp_path: Path, number: int) -> None:
    """The command is ended while it writes the weights of a layer of the 35B model."""
    command = [Path(sys.executable).with_name("et-moe"), "make-checkpoint", "--preset", "35b"]
    command += ["--layers", "1", "--output", tmp_path / "checkpoint"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("*.tmp/*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert error == f"error: ended by {number.name}\n"
    assert not list(tmp_path.iterdir())
