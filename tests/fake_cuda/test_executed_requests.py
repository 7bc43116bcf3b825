"""Requests that come, are cancelled and put back, and share prefixes, with the kernels executed:
their tokens are those that the CPU program gives each alone, without a prefix cache.

A call takes the interpreter a second or two. With ET_MOE_EXECUTED_REQUESTS set there are many, for
half an hour; without it a few.
"""

import json
import os
from pathlib import Path

import pytest

MANY = "ET_MOE_EXECUTED_REQUESTS" in os.environ
LONG = pytest.mark.skipif(not MANY, reason="takes too long: set ET_MOE_EXECUTED_REQUESTS")
CAPTURE = pytest.mark.parametrize(
    "graph", [pytest.param(False, id="eager", marks=LONG), pytest.param(True, id="graph")]
)
pytestmark = pytest.mark.timeout(3600)


def check(fake, folder: Path, graph: bool, sequences: int | str, *command) -> str:
    """Runs a command of async_engine_check with the kernels of a folder's program."""
    of = {
        name: (folder / name / "model.pte", folder / name / "model.ptd") for name in ("cpu", "cuda")
    }
    printed = fake.check(
        *(*of["cuda"], int(graph), sequences, *command, *of["cpu"]),
        tool="runner/async_engine_check",
        execute=str(folder / "cuda/kernels.json"),
        timeout=3600,
    )
    report = fake.report()
    assert not report["violations"] and not report["leaks"]
    return printed


@CAPTURE
def test_requests_that_come_and_go(fake, programs, graph: bool) -> None:
    command = ("random", 8, 2) if MANY else ("random", "4/4", 1)
    done = json.loads(check(fake, programs, graph, 3, *command))
    assert done["cancelled"] > 0
    assert done["cached_tokens"] > 0 or not MANY


@CAPTURE
def test_prompts_that_share_a_prefix(fake, programs, graph: bool) -> None:
    check(fake, programs, graph, 2, "prefix", 4 if MANY else 2)


@LONG
def test_requests_that_are_put_back(fake, programs) -> None:
    check(fake, programs / "long", True, "2/4", "grow")
