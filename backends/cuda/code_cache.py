"""Keeps compiled methods, for the next export that would make the same code.

A cache is a folder with one file per method and architecture: `CompiledMethod` as JSON, behind a
line with the SHA-256 of that JSON. A file is replaced as a whole, so that any number of processes
may share a folder. Kept code runs like a program of the user's: nothing is taken from a folder or
file that another user owns or may write to. No failure of the cache fails an export.
"""

import base64
import dataclasses
import hashlib
import json
import logging
import os
import stat
from pathlib import Path

import sympy
import torch
import triton
from torch._inductor import config as inductor_config
from triton._C.libtriton import get_cache_invalidating_env_vars

from et_moe.backends.atomic_file import write_file
from et_moe.backends.cuda.build import toolchain
from et_moe.backends.cuda.compile import CompiledMethod, CompiledRange, compile_method
from et_moe.backends.cuda.gpu import Gpu, gpu_for
from et_moe.backends.cuda.inductor import Kernel
from et_moe.backends.cuda.prepack import WeightPlan
from et_moe.backends.method_graph import MethodGraph

_LOG = logging.getLogger(__name__)

_BACKENDS = Path(__file__).resolve().parents[1]


def source_files(backends: Path = _BACKENDS) -> list[Path]:
    """What decides the code that comes out of a graph: the Python files that `compile` imports, the
    others beside them, and tuning tables.

    What tests and benchmarks run is none of it: a kernel folder's `cases.py`, `triton/cases`.
    """
    files = [f for folder in ("ops", "cuda") for f in (backends / folder).rglob("*")]
    sources = [f for f in files if f.suffix in (".py", ".json")]
    code = [f for f in sources if "cases" not in (f.stem, f.parent.name)]
    return sorted([*code, *backends.glob("*.py")])


def sources_digest(backends: Path = _BACKENDS) -> str:
    """Changes with any of `source_files`."""
    digest = hashlib.sha256()
    for path in source_files(backends):
        digest.update(f"{path.relative_to(backends)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(graph: MethodGraph, plan: WeightPlan, gpu: Gpu, tools: str) -> str:
    """Changes with anything that changes the compiled code."""
    values = [n.meta["val"] for n in graph.program.graph.nodes if n.op == "placeholder"]
    parts = [
        str(graph.program.graph),
        [None if v is None else f"{v.dtype} {list(v.shape)} {v.stride()}" for v in values],
        sorted(map(str, graph.program.range_constraints.items())),
        [graph.inputs, graph.outputs, graph.state, graph.weights, str(graph.hand_over)],
        [[name, *map(str, entry)] for name, entry in plan.spec.items()],
        dataclasses.astuple(gpu),
        [torch.__version__, triton.__version__, sympy.__version__, tools, sources_digest()],
        # What environment variables change in Inductor and in Triton.
        sorted(map(str, inductor_config.save_config_portable().items())),
        sorted(get_cache_invalidating_env_vars().items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _encode(method: CompiledMethod) -> bytes:
    entry = dataclasses.asdict(method)
    content = json.dumps(entry, default=lambda data: base64.b64encode(data).decode()).encode()
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _decode(data: bytes) -> CompiledMethod | None:
    """What `_encode` was given, or None if anything about its result has changed."""
    digest, _, content = data.partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None
    try:
        entry = json.loads(content)
        binaries = {digest: base64.b64decode(data) for digest, data in entry["binaries"].items()}
        ranges = [_decode_range(part) for part in entry["ranges"]]
        return CompiledMethod(entry["arch"], ranges, binaries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # another version's
        return None


def _decode_range(entry: dict) -> CompiledRange:
    code, kernels = base64.b64decode(entry["code"]), [Kernel(**k) for k in entry["kernels"]]
    return CompiledRange(**entry | {"code": code, "kernels": kernels})


def _distrust(info: os.stat_result) -> str:
    """Why code of a file or folder must not be run; empty if only this user and root write it."""
    if info.st_uid not in (0, os.geteuid()):
        return f"it belongs to another user ({info.st_uid})"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(info.st_mode)
        return f"others may write to it (its permissions are {mode:04o}, chmod go-w removes that)"
    return ""


class CodeCache:
    """Compiled methods in a folder that `open_cache` found to be good."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writable = True

    def load(self, key: str) -> CompiledMethod | None:
        """An entry, or None if there is none, it is damaged, or others could have written it."""
        path = self._folder / key
        try:
            with path.open("rb") as file:
                if reason := _distrust(os.fstat(file.fileno())):
                    _LOG.warning("the compiled code in %s is not used: %s", path, reason)
                    return None
                return _decode(file.read())
        except OSError:
            return None

    def store(self, key: str, method: CompiledMethod) -> None:
        """Writes an entry; where that fails it warns once and stores nothing more."""
        if not self._writable:
            return
        try:
            write_file(self._folder / key, _encode(method), mode=0o600)
        except OSError as error:
            self._writable = False
            _LOG.warning("compiled code is not kept for the next export: %s", error)


def open_cache(folder: Path | None) -> CodeCache | None:
    """The cache in a folder, which is made if need be; None, after a warning, if it cannot be used.

    Args:
        folder: may begin with `~`; None for no cache.
    """
    if folder is None:
        return None
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _distrust(folder.stat())
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        reason = str(error)
    if reason:
        _LOG.warning("the folder of compiled code %s is not used: %s", folder, reason)
        return None
    return CodeCache(folder)


def compile_cached(
    graph: MethodGraph, plan: WeightPlan, arch: str, cache: CodeCache | None
) -> CompiledMethod:
    """The same as `compile_method`, or what it returned earlier if nothing has changed."""
    if cache is None:
        return compile_method(graph, plan, arch)
    key = cache_key(graph, plan, gpu_for(arch), toolchain())
    method = cache.load(key)
    if method is None:
        method = compile_method(graph, plan, arch)
        cache.store(key, method)
    return method
