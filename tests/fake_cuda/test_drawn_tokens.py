"""Tokens that a program for CUDA draws outside of its vocabulary, over the fake driver."""

import json
from pathlib import Path

import pytest

VOCABULARY = 264


def message(program: Path, token: int) -> str:
    both = f"{program / 'model.pte'} with {program / 'model.ptd'}"
    return f"{both}: the token {token} is drawn, expected 0 to {VOCABULARY - 1}"


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("first", [1, 2, 5])
def test_of_one_sequence(fake, programs, first: int, graph: bool) -> None:
    """The token of a call, and those of calls that run ahead."""
    flags = ["--prompt_ids=1", "--max_new_tokens=9", *["--cuda_graph"] * graph]
    done = fake.runner(programs / "cuda", *flags, draw=f"{first}:-13")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {message(programs / 'cuda', -13)}"
    report = fake.report()
    assert not report["violations"] and not report["leaks"]


@pytest.mark.parametrize("token", [VOCABULARY, 2**31 - 1, -(2**63)])
def test_of_several_sequences(fake, programs, tmp_path: Path, token: int) -> None:
    """Requests are not blamed, whichever call draws it."""
    prompts = tmp_path / "prompts"
    lines = [{"prompt_ids": [1] * n, "max_new_tokens": 12} for n in (1, 9, 50)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for first in (1, 2, 3, 7):
        flags = (f"--prompts_path={prompts}", "--cuda_graph")
        done = fake.runner(programs / "cuda", *flags, draw=f"{first}:{token}")
        assert done.returncode == 1
        # The engine tries a sequence of its own before it gives up. A request that comes after that
        # has no line to be named.
        said = done.stderr.splitlines()[-1]
        assert said.startswith((f"error: {prompts}:", "error: the device failed: "))
        assert message(programs / "cuda", token) in said
