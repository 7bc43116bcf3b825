"""Keeps compiled methods, for the next export that would make the same code."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import triton

from et_moe.backends.cuda.build import toolchain
from et_moe.backends.cuda.compile import CompiledMethod, compile_method
from et_moe.backends.cuda.gpu import Gpu, gpu_for
from et_moe.backends.cuda.inductor import Kernel
from et_moe.backends.cuda.prepack import WeightPlan
from et_moe.backends.method_graph import MethodGraph


def _sources_digest() -> str:
    """Of everything in this folder that decides what code comes out: Python and tuning tables."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(graph: MethodGraph, plan: WeightPlan, gpu: Gpu, tools: str) -> str:
    """Changes with anything that changes the compiled code."""
    values = [n.meta["val"] for n in graph.program.graph.nodes if n.op == "placeholder"]
    parts = [
        str(graph.program.graph),
        [None if v is None else f"{v.dtype} {list(v.shape)} {v.stride()}" for v in values],
        sorted(map(str, graph.program.range_constraints.items())),
        [graph.inputs, graph.state, graph.weights],
        [[name, *map(str, entry)] for name, entry in plan.spec.items()],
        dataclasses.astuple(gpu),
        [torch.__version__, triton.__version__, tools, _sources_digest()],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _load(folder: Path, arch: str) -> CompiledMethod | None:
    """An entry of the cache, or None if it is absent or damaged."""
    try:
        entry = json.loads((folder / "method.json").read_text())
        code = (folder / "code.so").read_bytes()
        source = (folder / "host.cpp").read_text()
        kernels = [Kernel(**kernel) for kernel in entry["kernels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    method = CompiledMethod(arch, code, source, kernels)
    return method if method.sha256 == entry.get("sha256") else None


def _store(folder: Path, method: CompiledMethod) -> None:
    """Writes an entry of the cache; it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        (temporary / "code.so").write_bytes(method.code)
        (temporary / "host.cpp").write_text(method.source)
        kernels = [dataclasses.asdict(kernel) for kernel in method.kernels]
        entry = {"sha256": method.sha256, "kernels": kernels}
        (temporary / "method.json").write_text(json.dumps(entry))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def compile_cached(
    graph: MethodGraph, plan: WeightPlan, arch: str, cache_dir: Path | None
) -> CompiledMethod:
    """The same as `compile_method`, or what it returned earlier if nothing has changed.

    Args:
        cache_dir: folder of earlier results; None for no cache.
    """
    if cache_dir is None:
        return compile_method(graph, plan, arch)
    folder = cache_dir / cache_key(graph, plan, gpu_for(arch), toolchain())
    if cached := _load(folder, arch):
        return cached
    method = compile_method(graph, plan, arch)
    _store(folder, method)
    return method
