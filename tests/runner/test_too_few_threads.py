"""Where the system refuses to start threads, the runner goes on with those that it has, or says
what it lacks."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PROMPT = list(range(30))


@pytest.fixture
def run(runner, build_dir: Path, tiny_program: Path):
    """Runs the program with a flag, and so many threads beside the first; None for all it wants."""

    def limited(flag: str, threads: int | None) -> subprocess.CompletedProcess:
        few = {"LD_PRELOAD": str(build_dir / "tests/libfew_threads.so")}
        env = {} if threads is None else few | {"ET_MOE_TEST_THREADS": str(threads)}
        return runner.run(tiny_program, flag, env=os.environ | env, check=False)

    return limited


@pytest.mark.parametrize("threads", [0, 1])
def test_a_program_runs_with_fewer_threads(run, threads: int) -> None:
    flag = f"--prompt_ids={','.join(map(str, PROMPT))}"
    few, enough = run(flag, threads), run(flag, None)
    assert few.returncode == enough.returncode == 0, few.stderr
    assert few.stdout.splitlines()[0] == enough.stdout.splitlines()[0]


def test_many_prompts_need_a_thread_of_the_engine(run, tiny_program: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text(json.dumps({"prompt_ids": PROMPT}))
    flag = f"--prompts_path={prompts}"
    done = run(flag, 0)
    message = "the engine's thread cannot be started: Resource temporarily unavailable"
    assert done.returncode == 1
    assert done.stderr == f"error: {tiny_program / 'model.pte'}: {message}\n"
    few, enough = run(flag, 1), run(flag, None)
    assert few.returncode == enough.returncode == 0, few.stderr
    assert few.stdout.splitlines()[:2] == enough.stdout.splitlines()[:2]
