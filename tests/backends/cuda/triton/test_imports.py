"""Which folders of kernels import which, and that nothing that ships imports cases."""

import ast
from collections.abc import Iterator
from pathlib import Path

from et_moe.backends.cuda import triton as kernels

PACKAGE = kernels.__name__
FOLDER = Path(kernels.__file__).parent
SHARED = {"common", "tuning"}
COMPOSED = {
    "gated_delta_net": {"causal_conv1d", "linear"},
    "linear": {"causal_conv1d"},
    "moe": {"quantization"},
}
"""Ops that launch kernels of other ops, or compute a part of them in their own."""


def files() -> Iterator[Path]:
    for path in sorted(FOLDER.rglob("*.py")):
        if path.name != "cases.py" and path.parent.name != "cases":
            yield path


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, as parts of their names below it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {n for n in names if n.startswith(f"{PACKAGE}.")}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith(f"{PACKAGE}.")}
    return {tuple(name.removeprefix(f"{PACKAGE}.").split(".")) for name in found}


def test_ops_import_only_what_is_shared_and_what_they_are_composed_of():
    for path in files():
        own = path.parent.name
        if path.parent == FOLDER:
            continue  # the table, which has them all
        allowed = {own} | (SHARED if own not in SHARED else {"common"})
        allowed |= COMPOSED.get(own, set())
        used = {parts[0] for parts in imported(path)}
        assert used <= allowed, f"{path.relative_to(FOLDER)} imports {sorted(used - allowed)}"


def test_nothing_that_ships_imports_cases():
    backend = FOLDER.parent
    for path in [*files(), *backend.glob("*.py")]:
        assert not any("cases" in parts for parts in imported(path)), path
