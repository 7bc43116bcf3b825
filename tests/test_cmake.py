"""Configuring the build."""

import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def test_other_machines_are_refused_by_name(tmp_path: Path) -> None:
    command = ["cmake", "-S", REPO, "-B", tmp_path / "build"]
    command += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "et-moe runs on x86-64 only, this is aarch64" in done.stderr
