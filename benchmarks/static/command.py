"""Compiles every Triton kernel in every tuned configuration for all GPU architectures, and checks
the machine code; needs no GPU."""

import collections
import json
from pathlib import Path

import triton
import typer
from rich.console import Console
from rich.table import Table

from et_moe.backends.cuda.gpu import ARCHS
from et_moe.backends.cuda.triton.cases.table import OP_CASES
from et_moe.benchmarks.result import provenance, write_result
from et_moe.benchmarks.static import checked
from et_moe.benchmarks.static.check import faults
from et_moe.benchmarks.static.collect import Demands, Job, all_entries, collect
from et_moe.benchmarks.static.compare import compare_rows, describe
from et_moe.benchmarks.static.compile import Compiled, compile_jobs
from et_moe.benchmarks.static.machine_code import TENSOR_CORE_OPCODE, count_opcodes
from et_moe.benchmarks.static.summary import cells, summarize


def _instructions(made: dict[Job, Compiled]) -> dict[Job, dict]:
    """Counts the instructions of the jobs that could be compiled."""
    by_arch: dict[str, list[Job]] = collections.defaultdict(list)
    for job, compiled in made.items():
        if compiled.code:
            by_arch[job.arch].append(job)
    found = {}
    for arch, jobs in by_arch.items():
        counts = count_opcodes(arch, [made[job].code for job in jobs])
        for job, opcodes in zip(jobs, counts, strict=True):
            tensor = (n for name, n in opcodes.items() if TENSOR_CORE_OPCODE.fullmatch(name))
            found[job] = {
                "instructions": opcodes.total() - opcodes["NOP"],
                "tensor_instructions": sum(tensor),
                "opcodes": dict(opcodes.most_common(12)),
            }
    return found


def make_rows(jobs: dict[Job, Demands], processes: int) -> list[dict]:
    """Compiles all jobs; returns a row for each, in their order."""
    made = compile_jobs(list(jobs), processes)
    instructions = _instructions(made)
    return [
        {"arch": job.arch, "kernel": job.kernel, "configuration": job.configuration}
        | {"cases": sorted(demands.cases)}
        | made[job].row
        | instructions.get(job, {})
        for job, demands in jobs.items()
    ]


def _print_changes(path: Path, rows: list[dict], only: str) -> bool:
    """Prints how rows differ from those of an earlier result.

    Returns:
        Whether the machine code of any kernel is new, gone or another.
    """
    before = json.loads(path.read_text())["rows"]
    before = [row for row in before if any(only in case for case in row["cases"])]
    changes = compare_rows(before, rows)
    for kind, kernels in changes.items():
        for kernel in kernels:
            print(f"{kind.upper()} {kernel}")
    counts = ", ".join(f"{len(kernels)} {kind}" for kind, kernels in changes.items())
    print(f"against {path}: {counts}")
    return any(changes[kind] for kind in ("differ", "gone", "new"))


def _print_table(rows: list[dict]) -> None:
    table = Table("kernel", "n", *ARCHS, title="registers, KiB of shared memory, MMA instructions")
    for line in summarize(rows):
        table.add_row(*cells(line))
    Console(width=180).print(table)


def check(
    write: Path | None,
    compare: Path | None,
    processes: int,
    only: str,
    changed: bool = False,
    record: bool = False,
) -> bool:
    """Compiles and checks the kernels of the cases whose name contains `only`, and prints a table.

    Args:
        write: file for all rows, or None.
        compare: such a file to compare with, or None.
        changed: compile only what is not recorded, and a sample.
        record: write the keys of all these kernels, if all is well.

    Returns:
        Whether all is well: no kernel is at fault, every tuned configuration is compiled by some
        case, and machine code is that of `compare`.
    """
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("unset TRITON_INTERPRET: nothing is compiled under it")
    if (changed and (write or compare)) or (record and only):
        raise typer.BadParameter("--write, --compare and --record are of all kernels")
    jobs, reached = collect([case for case in OP_CASES if only in case.name])
    keys = checked.keys(jobs)
    if changed:
        some = checked.to_compile(keys, checked.read_checked())
        skipped = len(jobs) - len(some)
        print(f"{skipped} of {len(jobs)} kernels are as they were when they were checked")
        jobs = {job: jobs[job] for job in some}
    rows = make_rows(jobs, processes)
    problems = [
        f"{describe(row)}: {fault}"
        for (job, demands), row in zip(jobs.items(), rows, strict=True)
        for fault in faults(job, demands, row)
    ]
    if not only:
        problems += [
            f"tuning/{name}.json: entry {index} of {gpu!r} is reached by no case"
            for name, gpu, index in sorted(all_entries() - reached)
        ]
    _print_table(rows)
    if write is not None:
        write_result(write, provenance() | {"rows": rows})
    differs = compare is not None and _print_changes(compare, rows, only)
    if record and not problems:
        checked.write_checked(keys.values())
    for problem in problems:
        print(f"FAULT {problem}")
    print(f"{len(rows)} kernels compiled, {len(problems)} faults")
    return not problems and not differs
