"""Running the runner's binary from tests."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Runner:
    """The runner's binary."""

    binary: Path

    def run(self, program: Path, *flags: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs it on the `model.pte` and `model.ptd` of a directory."""
        command = [
            self.binary,
            f"--model_path={program / 'model.pte'}",
            f"--data_path={program / 'model.ptd'}",
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def generate(self, program: Path, prompt: list[int], count: int, *flags: str) -> list[int]:
        """The ids that follow `prompt`."""
        output = program / "output_ids.json"
        self.run(
            program,
            f"--prompt_ids={','.join(map(str, prompt))}",
            f"--max_new_tokens={count}",
            f"--output_ids_path={output}",
            *flags,
        )
        return json.loads(output.read_text())

    def score(self, program: Path, ids: list[int]) -> list[float]:
        """Teacher-forced log-probabilities of ids[1:]."""
        ids_path, output = program / "ids.json", program / "logprobs.json"
        ids_path.write_text(json.dumps(ids))
        self.run(program, f"--score_ids_path={ids_path}", f"--logprobs_path={output}")
        return json.loads(output.read_text())


@pytest.fixture(scope="session")
def runner(build_dir: Path) -> Runner:
    binary = build_dir / "runner" / "qwen3_5_moe_runner"
    assert binary.is_file(), f"{binary} is not built"
    return Runner(binary)


@pytest.fixture(scope="session")
def run_engine(build_dir: Path):
    """Runs a script, see engine_check.cpp, on one engine for the program of a directory."""

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
