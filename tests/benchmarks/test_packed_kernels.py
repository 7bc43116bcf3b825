"""Kernels that are compiled here for a GPU elsewhere, and how they are launched there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from et_moe.benchmarks.packed_kernels import PackedKernels

SESSION = Path(__file__).with_name("packed_session.py")


def run(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_launches_are_those_of_the_packed_kernel(tmp_path):
    done = run(SESSION, tmp_path)
    assert done.returncode == 0 and done.stdout == "launched\n", done.stderr[-3000:]


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_files_that_are_none(content, tmp_path):
    path = tmp_path / "kernels.zip"
    if content is None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("0.cubin", b"")
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"kernels\.zip: not a file of packed kernels"):
        PackedKernels(path, driver=object())


def test_candidates_of_a_table_are_packed(tmp_path):
    path = tmp_path / "kernels.zip"
    tune = ("-m", "et_moe.benchmarks", "tune", "--pack", path, "--tables", "router_decode")
    done = run(*tune, "--tokens", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    assert "index.json" in names and len(names) > 2


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--pack", "k.zip", "--gpu", "RTX 9"), "none of ['NVIDIA A100"),
        (("--pack", "k.zip", "--tables", "no_table"), "no candidates for ['no_table']"),
        (("--packed", "no.zip"), "no.zip"),
    ],
)
def test_wrong_flags(flags, message):
    done = run("-m", "et_moe.benchmarks", "tune", *flags)
    assert done.returncode != 0 and message in done.stderr.replace("\n", " "), done.stderr
