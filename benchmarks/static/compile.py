"""Compiles kernels with Triton, in several processes, and describes what came out."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib
import io
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable, Sequence

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.language import target_info

from et_moe.backends.cuda.gpu import ptxas_environment
from et_moe.backends.cuda.ptx import load_widths, read_early
from et_moe.benchmarks.static.collect import Job
from et_moe.benchmarks.static.machine_code import hash_code, hash_ptx, machine_code

INT8_MMA = r"(wgmma\.mma_async|mma\.sync)\S*\.s32\.s8\.s8"
SAME_LLVM_IR = ("sm_80", "sm_86", "sm_89")
"""Architectures for which Triton 3.7.1 makes the same LLVM IR of these kernels: its passes ask for
the first digit alone, but for FP8, which no kernel has. One compilation serves all up to there;
PTX and machine code are made for each."""
VERIFIED = 25
"""Every n-th of the kernels whose LLVM IR serves several architectures is compiled in full for each
of them, to see that it is the same."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a job.

    Attributes:
        row: figures for the report, or only an "error".
        code: machine code; empty after an error.
    """

    row: dict
    code: bytes = b""


def families(jobs: Iterable[Job]) -> list[tuple[Job, ...]]:
    """The jobs in groups that share their LLVM IR: see `SAME_LLVM_IR`."""
    found: dict[Job, list[Job]] = {}
    for job in jobs:
        shared = job.arch in SAME_LLVM_IR
        key = dataclasses.replace(job, arch=SAME_LLVM_IR[0]) if shared else job
        found.setdefault(key, []).append(job)
    return [tuple(family) for family in found.values()]


def _tell_target(target: GPUTarget) -> None:
    """Tells kernels that ask which architecture they are compiled for."""

    def current_target() -> GPUTarget:
        return target

    current_target.__triton_builtin__ = True
    target_info.current_target = current_target


def compile_source(job: Job, target: GPUTarget) -> tuple[dict, int]:
    """Triton's "llir", "ptx" and "cubin" of a kernel, and its bytes of shared memory."""
    _tell_target(target)
    source = ASTSource(
        fn=getattr(importlib.import_module(job.module), job.kernel),
        signature=dict(job.signature),
        constexprs=dict(job.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in job.divisible},
    )
    compiled = triton.compile(source, target=target, options=dict(job.options))
    return compiled.asm, compiled.metadata.shared


def count_parameters(ptx: str) -> int:
    """How many parameters a kernel has: those of its source, and Triton's own behind them."""
    entry = ptx[ptx.index(".entry") :]
    return entry[: entry.index(")")].count(".param")


def _from_llvm_ir(llir: str, job: Job, target: GPUTarget) -> dict:
    """The last two steps of `compile_source`, from another architecture's LLVM IR."""
    backend, metadata = make_backend(target), {}
    options = backend.parse_options(dict(job.options))
    ptx = backend.make_ptx(llir, metadata, options, target.arch)
    return {"llir": llir, "ptx": ptx, "cubin": backend.make_cubin(ptx, {}, options, target.arch)}


def _describe(job: Job, asm: dict, shared_memory: int, log: str) -> Compiled:
    """What the report says of a compiled kernel; `log` is what ptxas printed."""
    code = machine_code(asm["cubin"])
    pointers = [name for name, kind in job.signature if kind != "constexpr"]
    early = read_early(asm["ptx"], pointers)
    widths = load_widths(asm["ptx"], pointers)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    row = {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": sum(map(int, spills)),
        "shared_memory": shared_memory,
        "int8_mma": sorted(set(re.findall(INT8_MMA, asm["ptx"]))),
        "load_widths": {name: sorted(found) for name, found in widths.items()},
        "early": None if early is None else sorted(early),
        "ptx": hash_ptx(asm["ptx"], job.kernel),
        "sass": hash_code(code),
    }
    return Compiled(row, code)


def compile_family(family: Sequence[Job], verify: bool = False) -> list[Compiled]:
    """Compiles one of `families`.

    Args:
        verify: compile each job from its source, and see that LLVM IR is the same for all; a job
            for which it is not has an error.
    """
    results: list[Compiled] = []
    llir, shared_memory = None, 0
    for job in family:
        log = io.StringIO()
        try:
            target = GPUTarget("cuda", int(job.arch.removeprefix("sm_")), 32)
            with contextlib.redirect_stdout(log):
                if llir is None or verify:
                    asm, shared_memory = compile_source(job, target)
                else:
                    asm = _from_llvm_ir(llir, job, target)
            if llir not in (None, asm["llir"]):
                raise ValueError(f"its LLVM IR is not that of {family[0].arch}: see SAME_LLVM_IR")
            llir = asm["llir"]
            results.append(_describe(job, asm, shared_memory, log.getvalue()))
        except Exception as e:  # any failure to compile is a finding, and the others still count
            results.append(Compiled({"error": f"{type(e).__name__}: {str(e)[-400:]}"}))
    return results


def start_worker() -> None:
    """Prepares a process that compiles."""
    triton.knobs.nvidia.dump_ptxas_log = True
    os.environ.update(ptxas_environment())
    gc.disable()  # what it would free is 1 MB a kernel, and it searches all of torch each time


def compile_jobs(jobs: Sequence[Job], processes: int) -> dict[Job, Compiled]:
    """Compiles all jobs in a pool, with a cache of its own that is deleted."""
    groups = families(jobs)
    verified = set([group for group in groups if len(group) > 1][::VERIFIED])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=start_worker
        ) as pool:
            results = pool.map(compile_family, groups, [group in verified for group in groups])
            made = {
                job: compiled
                for group, found in zip(groups, results, strict=True)
                for job, compiled in zip(group, found, strict=True)
            }
    return {job: made[job] for job in jobs}
