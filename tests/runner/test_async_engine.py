"""The engine that serves many callers, driven from C++: see async_engine_check.cpp."""

import subprocess
from pathlib import Path

import pytest


def check(binary: Path, program: Path, sequences: int, *command: object) -> None:
    files = (program / "model.pte", program / "model.ptd")
    done = subprocess.run(
        [binary, *files, "0", str(sequences), *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(params=["release", "sanitize"])
def binary(request, build_dir: Path) -> Path:
    if request.param == "sanitize":
        build_dir = request.getfixturevalue("sanitize_dir")
    return build_dir / "tests" / "runner" / "async_engine_check"


@pytest.mark.parametrize("sequences", [1, 3, 20])
def test_requests_together_are_as_they_are_alone(binary, tiny_program, sequences: int) -> None:
    check(binary, tiny_program, sequences, "together", 40)


@pytest.mark.parametrize("sequences", [2, 3])
def test_requests_are_cancelled_at_every_point(binary, tiny_program, sequences: int) -> None:
    check(binary, tiny_program, sequences, "cancel")


@pytest.mark.parametrize("sequences", [1, 3])
def test_an_engine_closes_with_requests_in_flight(binary, tiny_program, sequences: int) -> None:
    check(binary, tiny_program, sequences, "close")
