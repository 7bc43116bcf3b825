"""The runner built with -DET_MOE_CUDA=OFF: no delegate, no CUDA wheels, no libsodium."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_programs import rewrite, write

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def without_cuda(build_dir: Path) -> Path:
    """The build folder of that runner, beside the usual one; it is kept for the next run.

    With ccache, as in scripts/test.sh, it takes objects of the usual build. Without, it is not
    optimized, since it only has to build.
    """
    folder = build_dir / "without_cuda"
    build_type = "Release" if "CMAKE_CXX_COMPILER_LAUNCHER" in os.environ else "None"
    options = [
        "-DET_MOE_CUDA=OFF",
        "-DET_MOE_CUDA_ROOT=/nonexistent",
        "-DET_MOE_SODIUM_LIBRARY=ET_MOE_SODIUM_LIBRARY-NOTFOUND",
        f"-DCMAKE_BUILD_TYPE={build_type}",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    for command in (
        ["cmake", "-S", REPO, "-B", folder, "-G", "Ninja", "--log-level=WARNING", *options],
        ["cmake", "--build", folder, "--target", "load_files"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def test_cpu_programs_run_and_cuda_programs_are_refused(without_cuda: Path, tmp_path: Path) -> None:
    program = write(tmp_path)
    pte, ptd = program / "model.pte", program / "model.ptd"
    tool = without_cuda / "tests" / "runner" / "load_files"

    def load() -> str:
        command = {"input": f"pte {pte}\n", "capture_output": True, "text": True}
        return subprocess.run([tool, pte, ptd], check=True, **command).stdout

    assert re.fullmatch(r"ok( \d+){3}\n", load())
    rewrite(program, b'\5\0\0\0"cpu"\0\0', b'\6\0\0\0"cuda"\0')  # the length comes before the text
    message = "this is a program for CUDA, and this runner was built without CUDA"
    assert load().startswith(f"error: {pte}: {message}")
    linked = subprocess.run(["ldd", tool], capture_output=True, text=True, check=True).stdout
    assert "executorch" in linked and "cudart" not in linked
