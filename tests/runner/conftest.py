"""Fixtures that run the engine by scripts."""

import json
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_engine(build_dir: Path):
    """Runs a script (see engine_check.cpp) on one engine for the program of a directory."""

    def run(program: Path, *script: dict) -> list[dict]:
        done = subprocess.run(
            [
                build_dir / "tests" / "runner" / "engine_check",
                program / "model.pte",
                program / "model.ptd",
            ],
            input="".join(json.dumps(command) + "\n" for command in script),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(script)
        return answers

    return run
