"""Compiles every Triton kernel in every tuned configuration for all GPU architectures, and checks
the machine code: spills, shared memory, tensor-core instructions, width of the weights' loads, and
that nothing is written before the kernel before has ended.

    python -m et_moe.benchmarks.static_report --write benchmarks/static

Needs no GPU. What is compiled are the launches that the ops really make, see
`et_moe.backends.cuda.triton.cases.op_case`.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info

from et_moe.backends.cuda.gpu import ARCHS, GPUS, gpu_for, ptxas_environment
from et_moe.backends.cuda.ptx import load_widths, read_early
from et_moe.backends.cuda.triton import tuning
from et_moe.backends.cuda.triton.cases.launches import Launch, record_launches
from et_moe.backends.cuda.triton.cases.lookups import record_lookups
from et_moe.backends.cuda.triton.cases.op_case import PREFILL_TOKENS, OpCase
from et_moe.backends.cuda.triton.cases.table import OP_CASES

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
INT8_MMA = r"(wgmma\.mma_async|mma\.sync)\S*\.s32\.s8\.s8"


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile: everything as Triton's compiler and a worker process want it."""

    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


@dataclasses.dataclass
class Demands:
    """Where a job was met and what is asked of it."""

    cases: set[str] = dataclasses.field(default_factory=set)
    tensor_cores: bool = False
    wgmma: bool = False
    streams: set[str] = dataclasses.field(default_factory=set)


def job_of(launch: Launch, arch: str) -> Job:
    """What Triton would compile for a launch; tensors count as aligned to 16 bytes."""
    signature, constexprs, divisible = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            kind = "constexpr"
            constexprs.append((name, getattr(value, "value", value)))
        elif isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            divisible.append(i)
        elif isinstance(value, bool):
            kind = "i1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(i)
        else:
            kind = "fp32"
        signature.append((name, kind))
    function = launch.kernel.fn
    return Job(
        function.__module__,
        function.__name__,
        arch,
        tuple(signature),
        tuple(constexprs),
        tuple(divisible),
        tuple(sorted(launch.options.items())),
    )


def targets() -> list[tuple[str, ...]]:
    """Names to look tuned configurations up by, the last of each being the architecture."""
    named = [(gpu.name, gpu.arch) for gpu in GPUS]
    return [*((arch,) for arch in ARCHS), *named]


def collect(cases: list[OpCase]) -> tuple[dict[Job, Demands], set[tuple[str, str, int]]]:
    """All different jobs of the cases, and the tuning entries (table, GPU, index) looked up."""
    jobs: dict[Job, Demands] = collections.defaultdict(Demands)
    reached = set()
    for case in cases:
        for names in targets():
            with tuning.tuning_target(*names), record_lookups() as lookups:
                for m in sorted(_tokens(case)):
                    with record_launches() as launches:
                        case.op(**case.arguments(m, torch.device("meta")))
                    for launch in launches:
                        _demand(jobs[job_of(launch, names[-1])], case, launch.name, m)
            reached |= {(lookup.table, lookup.gpu, lookup.index) for lookup in lookups}
    return dict(jobs), reached


def _tokens(case: OpCase) -> set[int]:
    """The case's numbers of tokens, and one for each entry of its tables, odd where possible: no
    divisibility must be relied on."""
    tokens = set(case.tokens)
    tables = [tuning.read_table(name) for name in case.tables] if len(tokens) > 1 else []
    for table in (table for table in tables if table.key == "tokens"):
        below = 0
        for entry in table.entries[tuning.find_gpu(table)]:
            bound = entry.bound or PREFILL_TOKENS
            tokens.add(bound - 1 if bound % 2 == 0 and bound - 1 > below else bound)
            below = bound
    return tokens


def _demand(demands: Demands, case: OpCase, kernel: str, m: int) -> None:
    demands.cases.add(case.name)
    demands.streams |= set(case.streams.get(kernel, ()))
    if kernel in case.gemms:
        demands.tensor_cores = True
        demands.wgmma |= m == PREFILL_TOKENS


def all_entries() -> set[tuple[str, str, int]]:
    """Every entry of every tuning table."""
    return {
        (path.stem, gpu, index)
        for path in tuning.FOLDER.glob("*.json")
        for gpu, entries in tuning.read_table(path.stem).entries.items()
        for index in range(len(entries))
    }


def opcodes(cubin: bytes) -> collections.Counter:
    """Machine instructions by opcode, "IMMA", "LDG", ..."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)"
    return collections.Counter(re.findall(pattern, text, re.MULTILINE))


def _compile_for(target: GPUTarget) -> None:
    """Lets kernels ask what they are compiled for; otherwise they would be told this machine's."""

    def current_target() -> GPUTarget:
        return target

    current_target.__triton_builtin__ = True
    target_info.current_target = current_target


def compile_job(job: Job) -> dict:
    """Compiles one kernel; the row of the report, or its "error"."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(job.signature),
        constexprs=dict(job.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in job.divisible},
    )
    capability = int(job.arch.removeprefix("sm_"))
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            target = GPUTarget("cuda", capability, 32)
            _compile_for(target)
            compiled = triton.compile(source, target=target, options=dict(job.options))
        ptx = compiled.asm["ptx"]
        pointers = [name for name, kind in job.signature if kind != "constexpr"]
        early = read_early(ptx, pointers)
    except Exception as e:  # any failure to compile is a finding, and the others still count
        return {"error": f"{type(e).__name__}: {str(e)[-400:]}"}
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    codes = opcodes(compiled.asm["cubin"])
    tensor = sum(count for code, count in codes.items() if re.fullmatch(r"\w*MMA", code))
    return {
        "registers": int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        "spilled_bytes": sum(map(int, spills)),
        "shared_memory": compiled.metadata.shared,
        "int8_mma": sorted(set(re.findall(INT8_MMA, ptx))),
        "load_widths": {k: sorted(v) for k, v in load_widths(ptx, pointers).items()},
        "early": None if early is None else sorted(early),
        "instructions": sum(codes.values()) - codes["NOP"],
        "tensor_instructions": tensor,
        "opcodes": dict(codes.most_common(12)),
    }


def faults(job: Job, demands: Demands, row: dict) -> list[str]:
    """What is wrong with a compiled kernel."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes spilled")
    limit = gpu_for(job.arch).shared_memory_per_block
    if row["shared_memory"] > limit:
        found.append(f"{row['shared_memory']} bytes of shared memory, {limit} available")
    wanted = "wgmma.mma_async" if demands.wgmma and job.arch == "sm_90" else None
    if demands.tensor_cores and not row["int8_mma"]:
        found.append("no int8 tensor-core instructions")
    elif wanted and wanted not in row["int8_mma"]:
        found.append(f"no int8 {wanted}")
    for name in sorted(demands.streams):
        widths = row["load_widths"].get(name, [])
        if not widths or min(widths) < 16:
            found.append(f"{name} is loaded {widths or 'never'} bytes at a time, expected 16")
    return found


def _describe(job: Job) -> str:
    blocks = [f"{k}={v}" for k, v in job.constexprs if k.isupper()]
    return " ".join(blocks + [f"{k}={v}" for k, v in job.options])


def _start_worker() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    os.environ.update(ptxas_environment())


def run(jobs: list[Job], processes: int) -> list[dict]:
    """Compiles all jobs in a pool, with a cache of its own that is deleted."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=_start_worker
        ) as pool:
            return list(pool.map(compile_job, jobs))


def write(folder: Path, rows: list[dict]) -> None:
    """`<arch>.json` per architecture and all in `README.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    for arch in ARCHS:
        mine = [row for row in rows if row["arch"] == arch]
        (folder / f"{arch}.json").write_text(json.dumps(mine, indent=1) + "\n")
    lines = [
        "# Machine code of the kernels",
        "",
        "Made by `python -m et_moe.benchmarks.static_report --write benchmarks/static` with triton "
        f"{triton.__version__}; no GPU takes part. MMA are tensor-core instructions.",
        "",
        "| arch | kernel | configuration | registers | shared memory | spilled | MMA | all |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "error" not in row:
            keys = ("arch", "kernel", "configuration", "registers", "shared_memory")
            keys += ("spilled_bytes", "tensor_instructions", "instructions")
            lines.append("| " + " | ".join(str(row[key]) for key in keys) + " |")
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def main(
    write_to: Annotated[
        Path | None, typer.Option("--write", help="Folder for JSON and Markdown tables.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Compiler processes.")] = 2,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
) -> None:
    """Exits with 1 if any kernel is at fault or a tuned configuration is reached by no case."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("unset TRITON_INTERPRET: nothing is compiled under it")
    cases = [case for case in OP_CASES if only in case.name]
    jobs, reached = collect(cases)
    results = run(list(jobs), processes)
    rows, problems = [], []
    table = Table("arch", "kernel", "configuration", "reg", "smem", "spill", "MMA", "instr")
    for (job, demands), row in zip(jobs.items(), results, strict=True):
        identity = {"arch": job.arch, "kernel": job.kernel, "configuration": _describe(job)}
        rows.append(identity | {"cases": sorted(demands.cases)} | row)
        columns = ("registers", "shared_memory", "spilled_bytes")
        columns += ("tensor_instructions", "instructions")
        table.add_row(*identity.values(), *(str(row.get(c, "-")) for c in columns))
        for fault in faults(job, demands, row):
            problems.append(f"{job.arch} {job.kernel} [{_describe(job)}]: {fault}")
    if not only:
        for name, gpu, index in sorted(all_entries() - reached):
            problems.append(f"tuning/{name}.json: entry {index} of {gpu!r} is reached by no case")
    Console(width=200).print(table)
    if write_to is not None:
        write(write_to, rows)
    for problem in problems:
        print(f"FAULT {problem}")
    print(f"{len(rows)} kernels compiled, {len(problems)} faults")
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    typer.run(main)
