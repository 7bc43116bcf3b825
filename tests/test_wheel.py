"""The wheel: built, installed with `[serve]` where there is nothing else, and run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

GENERATE = """
import sys
from et_moe.serving.llm import LLM, SamplingParams

params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
with LLM(sys.argv[1], max_sequences=2) as llm:
    for request in llm.generate([[58, 151, 241, 26, 230], "Hello"], params):
        print(*request.outputs[0].token_ids)
for name in ("torch", "executorch", "numpy"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is installed")
"""


def run(
    *command, code: int = 0, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a command without this environment's packages; it must end with `code`.

    variables: of the environment, besides.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ET_MOE"))}
    done = subprocess.run(
        list(map(str, command)),
        env=environment | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built in `build/wheel`, where building it again costs little.

    With ccache, as in scripts/test.sh, it takes the objects of the usual build. Without, it is not
    optimized, since other tests are of the code.
    """
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "-C", f"build-dir={REPO / 'build' / 'wheel'}"]
    if "CMAKE_CXX_COMPILER_LAUNCHER" not in os.environ:
        options += ["-C", "cmake.build-type=None"]
    # scikit-build-core would name the same compiler otherwise, and ccache would compile again.
    command = (sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, REPO)
    run(*command, CXX="c++")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The `bin` of a virtual environment that has the wheel, and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-compile", f"{wheel}[serve]")
    return folder / "bin"


@pytest.mark.timeout(1800)
def test_contents(wheel: Path) -> None:
    """The wheel has all packages, and nothing that is not part of one."""
    names = zipfile.ZipFile(wheel).namelist()
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    found = {name.rpartition("/")[0].replace("/", ".") for name in names if name.endswith(".py")}
    assert found == set(packages)
    for pattern in ("et_moe/backends/cuda/triton/tuning/*.json", "et_moe/benchmarks/*.cpp"):
        assert any(Path(name).match(pattern) for name in names), pattern
    left_out = (".h", ".txt", ".md", ".pyc")
    assert not [name for name in names if name.startswith("et_moe/") and name.endswith(left_out)]


@pytest.mark.timeout(1800)
def test_it_generates_where_there_is_nothing_else(environment, tiny_program, runner, tmp_path):
    printed = run(environment / "python", "-c", GENERATE, tiny_program, cwd=tmp_path).stdout
    ids = [list(map(int, line.split())) for line in printed.splitlines()]
    expected = runner.generate(tiny_program, [58, 151, 241, 26, 230], 6, "--temperature=0")
    assert ids[0] == expected and len(ids[1]) == 6
    files = (f"--model_path={tiny_program}/model.pte", f"--data_path={tiny_program}/model.ptd")
    flags = ("--prompt_ids=58,151,241,26,230", "--max_new_tokens=6", "--temperature=0")
    printed = run(environment / "qwen3_5_moe_runner", *files, *flags).stdout
    assert list(map(int, printed.splitlines()[0].split())) == expected


def image_instructions() -> dict[str, str]:
    """Instruction -> its arguments, of those that the Dockerfile has once."""
    text = (REPO / "Dockerfile").read_text().replace("\\\n", " ")
    return dict(line.split(" ", 1) for line in text.splitlines() if re.match("[A-Z]+ ", line))


@pytest.mark.timeout(1800)
def test_what_the_image_starts(environment, tiny_program, tmp_path) -> None:
    """Its command serves the program of its volume, its health check sees that, and it ends by the
    signal that containers get. What it installs is what `environment` has."""
    image = image_instructions()
    assert '"${wheel}[serve]"' in image["RUN"] and image["FROM"] == "python:3.11-slim-bookworm"
    command = json.loads(image["ENTRYPOINT"]) + json.loads(image["CMD"])
    check = json.loads(image["HEALTHCHECK"].partition("CMD ")[2])
    port = command[command.index("--port") + 1]
    assert image["EXPOSE"] == port and f":{port}/health" in check[-1]
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        free = str(probe.getsockname()[1])
    command = [{port: free, "/program": tiny_program}.get(part, part) for part in command]
    check = [part.replace(f":{port}/", f":{free}/") for part in check]
    with subprocess.Popen([environment / command[0], *command[1:]], cwd=tmp_path) as served:
        try:
            for _ in range(600):
                healthy = subprocess.run([environment / check[0], *check[1:]], capture_output=True)
                if healthy.returncode == 0 or served.poll() is not None:
                    break
                time.sleep(0.1)
        finally:
            served.send_signal(signal.SIGTERM)
    assert healthy.returncode == 0, healthy.stderr
    assert served.returncode == 0


@pytest.mark.timeout(1800)
def test_the_command_line_without_the_extra_export(environment, tmp_path) -> None:
    assert "quantize" in run(environment / "et-moe", "--help", cwd=tmp_path).stdout
    command = ("quantize", "--model-dir", tmp_path, "--output-dir", "x")
    done = run(environment / "et-moe", *command, code=1, cwd=tmp_path)
    assert done.stderr.startswith("error: No module named 'torch': what this command needs")
