"""Programs for the fake driver (see fake_cuda.h), and running them over it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from files import made_once

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """Folders of programs, see make_programs.py; exported once for all workers of a test run."""

    def make(folder: Path) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        tests = FOLDER.parent
        paths = (tests, tests / "backends" / "cuda", env.get("PYTHONPATH", ""))
        env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        subprocess.run([sys.executable, FOLDER / "make_programs.py", folder], env=env, check=True)

    return made_once(tmp_path_factory, "fake_cuda_programs", make)


class Fake:
    """Runs a build's programs over its fake driver."""

    def __init__(self, build: Path, report: Path) -> None:
        self._build, self._report = build, report

    def run(
        self,
        *command,
        preload: Path | None = None,
        stdin: str = "",
        timeout: float = 600,
        **environment: str,
    ) -> subprocess.CompletedProcess:
        """Runs a command; `environment` has variables of fake_cuda.h, in lower case and without
        prefix."""
        env = {"LD_PRELOAD": str(preload)} if preload else {}
        env |= {f"ET_MOE_FAKE_CUDA_{k.upper()}": v for k, v in environment.items()}
        env |= {"LD_LIBRARY_PATH": str(self._build / "tests/fake_cuda")}
        env |= {"ET_MOE_FAKE_CUDA_REPORT": str(self._report)}
        return subprocess.run(
            [self._build / command[0], *map(str, command[1:])],
            env=os.environ | env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def runner(self, program: Path, *flags, ptd: Path | None = None, **environment):
        files = ("--model_path", program / "model.pte", "--data_path", ptd or program / "model.ptd")
        return self.run("runner/qwen3_5_moe_runner", *files, *flags, **environment)

    def check(self, *command, tool: str = "fake_cuda/delegate_check", **further) -> str:
        """Runs a tool of the tests, which must succeed, and returns its output; `further`: as of
        `run`."""
        done = self.run(f"tests/{tool}", *command, **further)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def report(self) -> dict:
        return json.loads(self._report.read_text())


@pytest.fixture
def fake(build_dir: Path, tmp_path: Path) -> Fake:
    return Fake(build_dir, tmp_path / "report.json")


@pytest.fixture
def sanitized(sanitize_dir: Path, tmp_path: Path) -> Fake:
    return Fake(sanitize_dir, tmp_path / "report.json")
