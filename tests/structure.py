"""Checks of a tree's structure: floors, circular imports, sizes, packages, paths of a machine.

Each check takes the files of a tree and returns its faults as lines of text. Nothing is imported or
compiled: Python's imports come from its syntax trees, those of C++ from its `#include "..."` lines.
"""

import ast
import graphlib
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = "et_moe"
MOST_LINES = 400

TRITON, RUNTIME = "backends/cuda/triton", "backends/cuda/runtime"
SHARED, TUNING, OP = f"{TRITON}/common", f"{TRITON}/tuning", f"{TRITON}/OP"
CASES = f"{TRITON}/cases"
CONTRACTS = {"backends", "backends/ops"}
USES = {
    "backends": set(),
    "backends/ops": {"backends"},
    "backends/cpu": CONTRACTS,
    TUNING: set(),
    SHARED: {*CONTRACTS, TUNING},
    OP: {*CONTRACTS, TUNING, SHARED},
    TRITON: {*CONTRACTS, TUNING, SHARED, OP},
    CASES: {*CONTRACTS, TUNING, SHARED, OP, TRITON},
    "backends/cuda": {*CONTRACTS, TUNING, SHARED, OP, TRITON},
    RUNTIME: {"backends"},
    "pipeline": {*CONTRACTS, "backends/cpu", "backends/cuda"},
    "examples": {*CONTRACTS, "pipeline"},
    "runner": {"backends", RUNTIME},
    "serving": {"runner"},
    "cli.py": {"pipeline", "serving"},
}
"""Floor -> the floors that it may use besides itself. A file's floor is the longest prefix of its
path in this table. Any other folder of `TRITON` holds the kernels of one op and is an `OP`, but for
its file `cases.py`, which is for tools and belongs to `CASES`: a program is compiled without it."""

FUSED = {
    "gated_delta_net": {"causal_conv1d", "linear"},
    "out_projection": {"attention", "gated_delta_net", "linear"},
    "linear": {"causal_conv1d"},
    "moe": {"quantization"},
}
"""Op -> ops whose kernels or launches are part of its own; other ops know nothing of each other."""

FREE = {"benchmarks", "scripts", "tests"}
"""Folders that may use everything and that no floor uses."""

Files = dict[str, bytes]
"""Path relative to the root of a tree -> content."""


def read_files(root: Path) -> Files:
    """The files that git tracks below `root`, without those that are deleted in the work tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    paths = [name for name in names.stdout.decode().split("\0") if (root / name).is_file()]
    return {path: (root / path).read_bytes() for path in paths}


def floor(path: str) -> str:
    """The floor of a file (a folder); its topmost folder if it is on none of `USES`."""
    folders = path.split("/")[:-1]
    prefixes = ["/".join(folders[:n]) for n in range(len(folders), 0, -1)]
    found = next((prefix for prefix in prefixes if prefix in USES), path.split("/")[0])
    if found != TRITON or folders == TRITON.split("/"):
        return found
    return CASES if path.endswith("/cases.py") else "/".join(folders[:4])


def may_use(user: str, used: str) -> bool:
    """Whether one floor may use the other."""
    if user == used or user in FREE:
        return True
    kinds = [OP if name not in USES and name.startswith(TRITON) else name for name in (user, used)]
    if kinds == [OP, OP]:
        return Path(used).name in FUSED.get(Path(user).name, ())
    return kinds[1] in USES.get(kinds[0], ())


def module_name(path: str) -> str:
    """The dotted name of a Python file."""
    folders, file = path.split("/")[:-1], path.rpartition("/")[2].removesuffix(".py")
    return ".".join([PACKAGE, *folders, *([] if file == "__init__" else [file])])


def python_imports(path: str, source: bytes) -> Iterator[tuple[str, bool]]:
    """For all imports of a file: the name that is imported, and whether it is inside a function."""
    tree = ast.parse(source, path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    folders = [PACKAGE, *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) + 1 - node.level] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def edges(files: Files) -> Iterator[tuple[str, str, bool]]:
    """Triples of a file, a file of the tree that it imports or includes, and whether it does so
    inside a function."""
    modules = {module_name(path): path for path in files if path.endswith(".py")}
    for path, content in files.items():
        if path.endswith(".py"):
            for name, inside in python_imports(path, content):
                used = modules.get(name) or modules.get(name.rpartition(".")[0])
                if used is not None and used != path:
                    yield path, used, inside
        elif path.endswith((".cpp", ".h")):
            for name in re.findall(rb'^\s*#\s*include "(.+)"', content, re.MULTILINE):
                if name.decode() in files:
                    yield path, name.decode(), False


def wrong_floors(files: Files) -> list[str]:
    """Uses of a floor that is not below."""
    wrong = ((u, used) for u, used, _ in edges(files) if not may_use(floor(u), floor(used)))
    return [f"{user} uses {used}" for user, used in dict.fromkeys(wrong)]


def leaks_of_the_device(files: Files) -> list[str]:
    """The runner knows CUDA by one module (a `.cpp` and its header), which implements its interface
    of a device; of the runner's other files only sources include that header."""
    used_by = {(user, used) for user, used, _ in edges(files) if floor(user) == "runner"}
    module = {user for user, used in used_by if floor(used) == RUNTIME}
    several = len({Path(user).stem for user in module}) > 1
    faults = [f"{sorted(module)} include {RUNTIME}: expected one module"] if several else []
    return faults + [
        f"{user} is a header and includes {used}"
        for user, used in sorted(used_by)
        if used in module and user not in module and user.endswith(".h")
    ]


def _circles(files: Files, in_functions: bool) -> list[str]:
    """The first circle, if there is one; with imports inside functions, or without them."""
    graph: dict[str, set[str]] = {}
    for user, used, inside in edges(files):
        if in_functions or not inside:
            graph.setdefault(user, set()).add(used)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [", which is used by ".join(error.args[1])]
    return []


def circular_imports(files: Files) -> list[str]:
    """Circles of imports and includes at the top of files."""
    return _circles(files, in_functions=False)


def circular_imports_of_functions(files: Files) -> list[str]:
    """Circles that only imports inside functions close: such modules load, and still need each
    other."""
    return [] if circular_imports(files) else _circles(files, in_functions=True)


def long_files(files: Files) -> list[str]:
    """Code files of more than `MOST_LINES` lines."""
    code = [path for path in files if path.endswith((".py", ".cpp", ".h", ".sh"))]
    lengths = {path: files[path].count(b"\n") for path in code}
    return [f"{path} has {n} lines" for path, n in lengths.items() if n > MOST_LINES]


def wrong_packages(files: Files) -> list[str]:
    """Differences between the folders with an `__init__.py` and the packages of pyproject.toml."""
    project = tomllib.loads(files["pyproject.toml"].decode())
    declared = set(project["tool"]["setuptools"]["packages"])
    there = {module_name(path) for path in files if path.rpartition("/")[2] == "__init__.py"}
    missing = [f"pyproject.toml lacks the package {name}" for name in sorted(there - declared)]
    return missing + [f"pyproject.toml names {name}" for name in sorted(declared - there)]


def machine_paths(files: Files) -> list[str]:
    """Absolute paths that exist on somebody's machine only."""
    pattern = re.compile(rb"(?<![\w./-])/(?:work|home|root|Users)/[\w.-]+")
    found = {path: pattern.search(content) for path, content in files.items()}
    return [f"{path} holds {match[0].decode()}" for path, match in found.items() if match]


CHECKS: list[Callable[[Files], list[str]]] = [
    wrong_floors,
    leaks_of_the_device,
    circular_imports,
    circular_imports_of_functions,
    long_files,
    wrong_packages,
    machine_paths,
]
