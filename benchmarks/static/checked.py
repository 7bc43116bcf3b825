"""Which kernels were compiled before and found well: a key each in `checked.txt`.

A key covers all that decides what comes out of the compiler and what is asked of it, so a kernel
whose key is there is well still. A sample of them is compiled all the same, another one after every
change.
"""

import hashlib
import importlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import triton

from et_moe.backends.atomic_file import write_file
from et_moe.backends.cuda.gpu import ptxas
from et_moe.benchmarks.static.collect import Demands, Job

FILE = Path(__file__).with_name("checked.txt")
SAMPLE = 24
"""One of so many kernels that were checked is compiled again."""

_CUDA = Path(__file__).resolve().parents[2] / "backends" / "cuda"
_CHECKS = [
    *(Path(__file__).with_name(f"{name}.py") for name in ("check", "compile", "machine_code")),
    *(_CUDA / f"{name}.py" for name in ("gpu", "ptx")),
]


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _tools() -> str:
    """Changes with the compilers and with the code that checks."""
    version = subprocess.run([ptxas(), "--version"], check=True, capture_output=True, text=True)
    return _digest(triton.__version__, version.stdout, *(path.read_text() for path in _CHECKS))


def keys(jobs: dict[Job, Demands]) -> dict[Job, str]:
    """The key of each job: 16 hexadecimal digits."""
    tools = _tools()
    found = {}
    for job, demands in jobs.items():
        kernel = getattr(importlib.import_module(job.module), job.kernel)
        asked = (demands.tensor_cores, demands.wgmma, sorted(demands.streams))
        # Triton's key covers the functions and global constants that the kernel uses, too.
        found[job] = _digest(tools, kernel.cache_key, job, asked)
    return found


def read_checked(path: Path = FILE) -> set[str]:
    """The keys of a file; none if there is no file."""
    return set(path.read_text().split()) if path.exists() else set()


def write_checked(found: Iterable[str], path: Path = FILE) -> None:
    """Replaces a file by one of these keys."""
    write_file(path, "".join(f"{key}\n" for key in sorted(set(found))).encode())


def to_compile(found: dict[Job, str], checked: set[str]) -> list[Job]:
    """The jobs that were not checked, and the sample of the others."""
    turn = int(_digest(*sorted(found.values())), 16) % SAMPLE
    return [
        job for job, key in found.items() if key not in checked or int(key, 16) % SAMPLE == turn
    ]
