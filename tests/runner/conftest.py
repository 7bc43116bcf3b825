"""Fixtures that run the engine by scripts, and the runner with bad input."""

import json
import subprocess
from pathlib import Path

import pytest
from files import made_once


@pytest.fixture(scope="session")
def long_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a context of 8192 tokens, which it fills after the prompt 1, 2; a decode
    call takes up to three sequences."""
    from checkpoints import export_small

    def make(folder: Path) -> None:
        # Greedy decoding does not come to the id 0.
        export_small(folder, 8192, max_sequences=3, eos_token_id=[0])

    return made_once(tmp_path_factory, "long_program", make) / "program"


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


@pytest.fixture
def refused(runner, tiny_program: Path, tmp_path: Path):
    """Runs the runner, checks how it fails and returns what it says; `files` replace those of
    `tiny_program`."""
    output = tmp_path / "output"
    output.mkdir()

    def check(*flags: str, parts: list[str], **files: Path) -> str:
        paths = {
            "model_path": tiny_program / "model.pte",
            "data_path": tiny_program / "model.ptd",
        }
        if not any(flag.startswith("--score_ids_path") for flag in flags):
            paths |= {"output_ids_path": output / "ids.json", "stats_path": output / "stats.json"}
        paths |= files
        command = [runner.binary, *(f"--{flag}={path}" for flag, path in paths.items()), *flags]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        assert done.returncode > 0, (done.returncode, done.stdout, done.stderr)
        for part in parts:
            assert part in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 3, done.stderr
        assert not list(output.iterdir())
        return done.stderr

    return check
