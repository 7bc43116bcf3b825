"""Results as JSON files: what was found, and by which command, commit and machine."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from et_moe.backends.atomic_file import write_file

REPO = Path(__file__).resolve().parent.parent
RUNNER = REPO / "build/runner/qwen3_5_moe_runner"
PACKAGES = ("torch", "triton", "nvidia-cuda-nvcc", "executorch", "transformers", "numpy")
MANIFEST_VARIABLE = "ET_MOE_MANIFEST"
"""Environment variable that names a manifest of `scripts/pack_acceptance.py`: it tells the commit
of a copy of the sources that came without its history."""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.rstrip("\0\n")


def committed_files() -> dict[str, str]:
    """Path -> git's hash of every file of the commit; empty without git."""
    listing = _git("ls-tree", "-r", "-z", "HEAD")
    entries = (entry.partition("\t") for entry in listing.split("\0")) if listing else ()
    return {path: head.split()[2] for head, _, path in entries}


def _holds(files: dict[str, str]) -> bool:
    """Whether the sources here are these files."""
    for name, expected in files.items():
        path = REPO / name
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != expected:
            return False
    return bool(files)


def commit() -> dict[str, str | bool | None]:
    """`commit` of the sources, and whether they are `modified`; None where that cannot be told."""
    manifest = os.environ.get(MANIFEST_VARIABLE)
    if manifest:
        packed = json.loads(Path(manifest).read_text())
        if _holds(packed.get("files", {})):
            return {"commit": packed["commit"], "modified": False}
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    if head is None or changes is None:
        return {"commit": None, "modified": None}
    return {"commit": head, "modified": bool(changes)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_gpu() -> dict[str, str] | None:
    """Name, driver, memory and compute capability of the first NVIDIA GPU, or None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap"]
    try:
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 else []
    except (OSError, IndexError):
        values = []
    keys = ("gpu", "driver", "memory", "compute_capability")
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else None


def versions() -> dict[str, str | None]:
    """Of Python and the packages that decide what is measured; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def provenance(command: str | None = None) -> dict:
    """The head of every result: command (by default this process's), commit, machine, versions.

    The command calls a packed folder, if that is where the sources come from, FOLDER.
    """
    gpu, manifest = describe_gpu(), os.environ.get(MANIFEST_VARIABLE)
    command = command or shlex.join(["python", "-m", "et_moe.benchmarks", *sys.argv[1:]])
    return {
        "command": command.replace(str(Path(manifest).parent), "FOLDER") if manifest else command,
        **commit(),
        "machine": gpu["gpu"] if gpu else _processor(),
        "driver": gpu["driver"] if gpu else None,
        "cpus": os.cpu_count(),
        "versions": versions(),
    }


def rounded(value: object, digits: int = 7) -> object:
    """`value` with all floats in it rounded to some significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float) and math.isfinite(value) and value:
        return round(value, digits - 1 - math.floor(math.log10(abs(value))))
    return value


def format_result(result: dict) -> str:
    """JSON text with a line for each row of each list."""
    blocks = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        blocks.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def write_result(path: Path, result: dict) -> None:
    """Writes a result; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, format_result(result).encode())
