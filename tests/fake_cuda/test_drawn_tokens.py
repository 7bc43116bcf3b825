"""Tokens that a program for CUDA draws outside of its vocabulary, over the fake driver."""

import json
from pathlib import Path

import pytest

VOCABULARY = 264
EXPECTED = f"is drawn, expected 0 to {VOCABULARY - 1}"


def ends(done, program: Path, where: str, token: int) -> None:
    both = f"{program / 'model.pte'} with {program / 'model.ptd'}"
    message = f"error: {where}{both}: the token {token} {EXPECTED}\n"
    assert done.returncode == 1 and done.stderr.endswith(message), done.stderr


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("first", [1, 2, 5])
def test_of_one_sequence(fake, programs, first: int, graph: bool) -> None:
    """The token of a call, and those of calls that run ahead."""
    flags = ["--prompt_ids=1", "--max_new_tokens=9", *["--cuda_graph"] * graph]
    done = fake.runner(programs / "cuda", *flags, draw=f"{first}:-13")
    ends(done, programs / "cuda", "", -13)
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
        assert done.stderr.splitlines()[-1].startswith(f"error: {prompts}:"), done.stderr
        where = done.stderr.splitlines()[-1].split(str(programs))[0].removeprefix("error: ")
        ends(done, programs / "cuda", where, token)
