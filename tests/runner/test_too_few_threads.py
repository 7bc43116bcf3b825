"""Where the system refuses to start threads, the runner goes on with those that it has."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize("threads", [0, 1])
def test_a_program_runs_with_fewer_threads(
    runner, build_dir: Path, tiny_program: Path, threads: int
) -> None:
    prompt = ",".join(str(i) for i in range(30))
    command = [runner.binary, f"--model_path={tiny_program / 'model.pte'}"]
    command += [f"--data_path={tiny_program / 'model.ptd'}", f"--prompt_ids={prompt}"]

    def first_line(**environment: str) -> str:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[0]

    few = {"LD_PRELOAD": str(build_dir / "tests/libfew_threads.so")}
    assert first_line(**few, ET_MOE_TEST_THREADS=str(threads)) == first_line()
