"""The interpreter that executes launches notices accesses outside of live memory."""

import subprocess
import sys
from pathlib import Path

import pytest

# It runs in a process of its own, as it replaces parts of Triton for good.
SCRIPT = """
import sys

sys.path.insert(0, sys.argv[1])
import interpreter as executor
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def copy(source, target, count, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def count(source, target, count, N: tl.constexpr):
    tl.atomic_add(target + tl.arange(0, N), 1, mask=tl.arange(0, N) < count)


kernel = {"copy": copy, "count": count}[sys.argv[2]]
live, used = [int(i) for i in sys.argv[3].split(",")], int(sys.argv[4])
memory = executor.Memory.__new__(executor.Memory)
interpreter._interpreter = executor.CheckedInterpreter(interpreter._interpreter, memory)
source, target = (torch.arange(16, dtype=torch.int32) for _ in range(2))
tensors = zip((source, target), live, strict=True)
memory.set_allocations(sorted([t.data_ptr(), 4 * size] for t, size in tensors))
kernel[(1,)](source, target, used, N=16)
"""


@pytest.mark.parametrize(
    ("kernel", "live", "used", "fault"),
    [
        ("copy", "8,8", 8, ""),
        ("copy", "8,16", 9, "load of 4 bytes"),
        ("copy", "16,8", 9, "store of 4 bytes"),
        ("copy", "0,16", 1, "load of 4 bytes"),
        ("count", "0,8", 8, ""),
        ("count", "0,8", 9, "atomic access of 4 bytes"),
    ],
)
def test_an_access_outside_is_an_error(tmp_path, kernel, live, used, fault) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, Path(__file__).parent, kernel, live, str(used)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(fault), done.stderr
    assert f"{fault} at 0x" in done.stderr if fault else not done.stderr
