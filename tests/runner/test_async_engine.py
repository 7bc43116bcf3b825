"""The engine that serves many callers, driven from C++: see async_engine_check.cpp."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import export_small


def check(binary: Path, program: Path, sequences: int | str, *command: object) -> str:
    files = (program / "model.pte", program / "model.ptd")
    done = subprocess.run(
        [binary, *files, "0", str(sequences), *map(str, command)],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(params=["release", "sanitize"])
def binary(request, build_dir: Path) -> Path:
    if request.param == "sanitize":
        build_dir = request.getfixturevalue("sanitize_dir")
    return build_dir / "tests" / "runner" / "async_engine_check"


@pytest.mark.parametrize("sequences", [1, 3, 20])
def test_requests_together_are_as_they_are_alone(binary, tiny_program, sequences: int) -> None:
    check(binary, tiny_program, sequences, "together", 40)


def test_as_many_as_a_program_decodes_at_once(build_dir, tmp_path: Path) -> None:
    program = export_small(tmp_path, context=32, max_sequences=256)
    check(build_dir / "tests/runner/async_engine_check", program, 256, "together", 300)


@pytest.mark.parametrize("sequences", [2, 3])
def test_requests_are_cancelled_at_every_point(binary, tiny_program, sequences: int) -> None:
    check(binary, tiny_program, sequences, "cancel")


@pytest.mark.parametrize("sequences", [1, 3])
def test_an_engine_closes_with_requests_in_flight(binary, tiny_program, sequences: int) -> None:
    check(binary, tiny_program, sequences, "close")


@pytest.fixture(scope="module")
def paged_program(tmp_path_factory) -> Path:
    """Sequences of up to four pages; a decode call takes up to five of them."""
    return export_small(tmp_path_factory.mktemp("paged"), context=200, max_sequences=5)


@pytest.mark.parametrize("sequences", ["1", "7", "3/4"])
def test_requests_of_several_pages(binary, paged_program, sequences: str) -> None:
    check(binary, paged_program, sequences, "together", 40)


@pytest.mark.parametrize("sequences", [1, 3])
def test_prompts_that_share_a_prefix(binary, paged_program, sequences: int) -> None:
    check(binary, paged_program, sequences, "prefix", 6)


def test_a_sequence_is_put_back_as_it_grows(build_dir, paged_program) -> None:
    check(build_dir / "tests/runner/async_engine_check", paged_program, "2/4", "grow")


def test_long_prompts_beside_others(build_dir, paged_program) -> None:
    check(build_dir / "tests/runner/async_engine_check", paged_program, 4, "pieces", 8)


@pytest.fixture(scope="module")
def bf16_state_program(tmp_path_factory) -> Path:
    """The same with a recurrent state of bfloat16."""
    folder = tmp_path_factory.mktemp("bf16 state")
    return export_small(folder, context=200, max_sequences=5, recurrent_state_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("sequences", "command"),
    [
        ("4", ("pieces", 8)),
        ("7", ("together", 40)),
        ("3", ("prefix", 6)),
        ("8/5", ("random", 32, 40)),
    ],
    ids=str,
)
def test_a_recurrent_state_of_bfloat16(build_dir, bf16_state_program, sequences, command) -> None:
    """It is rounded where pages of a prompt end, so no token depends on how a prompt was cut."""
    check(build_dir / "tests/runner/async_engine_check", bf16_state_program, sequences, *command)


@pytest.mark.parametrize("command", ["random", "plain"])
@pytest.mark.parametrize("sequences", ["7", "8/5"], ids=["all pages", "few pages"])
def test_requests_that_come_and_go(build_dir, paged_program, sequences: str, command: str) -> None:
    """With few pages some are put back, and begin anew later. With and without prefix cache the
    tokens are those of each alone without one."""
    binary = build_dir / "tests" / "runner" / "async_engine_check"
    done = json.loads(check(binary, paged_program, sequences, command, 32, 200))
    assert done["cancelled"] > 200
    assert (done["cached_tokens"] > 0) == (command == "random")
    assert done["preemptions"] > 50 or sequences == "7"


def test_memory_is_flat(build_dir, paged_program) -> None:
    """ET_MOE_SOAK_REQUESTS is how many requests there are in a row; 100,000 take minutes."""
    binary = build_dir / "tests" / "runner" / "async_engine_check"
    check(binary, paged_program, "16/20", "soak", os.environ.get("ET_MOE_SOAK_REQUESTS", 1000))


def test_requests_that_come_and_go_under_sanitizers(sanitize_dir, paged_program) -> None:
    binary = sanitize_dir / "tests" / "runner" / "async_engine_check"
    check(binary, paged_program, "8/5", "random", 32, 10)
