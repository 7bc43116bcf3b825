"""The structure of this repository, and that each check of it notices what it is there for."""

import subprocess
from pathlib import Path

import pytest
from structure import (
    CHECKS,
    RUNTIME,
    SHARED,
    TRITON,
    Files,
    circular_imports,
    circular_imports_of_functions,
    leaks_of_the_device,
    long_files,
    machine_paths,
    read_files,
    wrong_floors,
    wrong_packages,
)

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("check", CHECKS)
def test_this_repository(check) -> None:
    faults = check(read_files(REPO))
    assert not faults, "\n".join(faults)


PYPROJECT = '[tool.setuptools]\npackages = ["et_moe", "et_moe.{}"]'
CLEAN = {
    "__init__.py": "",
    "pyproject.toml": PYPROJECT.format("backends.cuda.triton.moe"),
    "backends/ops/moe.py": "TILE = 1",
    "backends/cuda/triton/moe/__init__.py": "",
    "backends/cuda/triton/moe/op.py": "from et_moe.backends.ops.moe import TILE",
    "backends/cuda/triton/quantization/op.py": "import et_moe.backends.ops.moe",
    "backends/cuda/triton/cases/op_case.py": "class OpCase: pass",
    "backends/cuda/triton/router/cases.py": "from et_moe.backends.cuda.triton.cases import op_case",
    "backends/cuda/runtime/context.h": "#pragma once",
    "pipeline/models.py": 'MODELS = {"qwen": "et_moe.examples.qwen"}',
    "examples/qwen/graph.py": "import torch\nfrom et_moe.pipeline import models",
    "runner/cuda_device.h": '#include "backends/cuda/runtime/context.h"',
    "runner/device.cpp": '#include "runner/cuda_device.h"',
    "tests/test_all.py": "from et_moe.examples.qwen import graph",
}


def make_tree(folder: Path, changes: dict[str, str]) -> Files:
    """Makes a git repository of `CLEAN` with changes, and gives what the checks take."""
    for path, content in (CLEAN | changes).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return read_files(folder)


@pytest.mark.parametrize("check", CHECKS)
def test_a_tree_without_faults(tmp_path, check) -> None:
    assert check(make_tree(tmp_path, {})) == []


CUDA_HEADER = f'#include "{RUNTIME}/context.h"'
DEVICE_HEADER = '#include "runner/cuda_device.h"'
MODELS = "from et_moe.examples.qwen import graph"


@pytest.mark.parametrize(
    ("check", "path", "content", "fault"),
    [
        (wrong_floors, "pipeline/x.py", MODELS, "pipeline/x.py uses examples/qwen/graph.py"),
        (wrong_floors, "pipeline/x.py", f"def f():\n    {MODELS}", "pipeline/x.py uses"),
        (wrong_floors, "pipeline/x.py", "import et_moe.tests.test_all", "tests/test_all.py"),
        (wrong_floors, "backends/ops/x.py", "from ..cuda.triton.moe import op", "triton/moe/op.py"),
        (wrong_floors, f"{SHARED}/x.py", "from ..moe.op import f", "common/x.py uses"),
        (wrong_floors, f"{TRITON}/router/op.py", "from ..moe import op", "router/op.py uses"),
        (wrong_floors, f"{TRITON}/router/op.py", "from . import cases", "op.py uses"),
        (wrong_floors, f"{RUNTIME}/x.h", DEVICE_HEADER, "runtime/x.h uses"),
        (wrong_floors, "elsewhere/x.py", "from et_moe.pipeline import models", "elsewhere/x.py"),
        (leaks_of_the_device, "runner/x.h", DEVICE_HEADER, "runner/x.h is a header"),
        (leaks_of_the_device, "runner/x.cpp", CUDA_HEADER, "expected one module"),
        (circular_imports, "pipeline/models.py", MODELS, "used by"),
        (circular_imports, f"{RUNTIME}/context.h", DEVICE_HEADER, "used by"),
        (circular_imports_of_functions, "pipeline/models.py", f"def f():\n    {MODELS}", "used by"),
        (long_files, "scripts/x.sh", ":\n" * 401, "scripts/x.sh has 401 lines"),
        (wrong_packages, "examples/qwen/__init__.py", "", "lacks the package et_moe.examples.qwen"),
        (wrong_packages, "pyproject.toml", PYPROJECT.format("old"), "names et_moe.old"),
        (machine_paths, "docs/x.md", "see /" + "home/me/notes", "docs/x.md holds"),
    ],
)
def test_a_fault_is_found(tmp_path, check, path: str, content: str, fault: str) -> None:
    files = make_tree(tmp_path, {path: content})
    assert [line for line in check(files) if fault in line], check(files)
    assert all(not other(files) for other in CHECKS if other not in (check, wrong_floors))
