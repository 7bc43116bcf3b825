"""Fills `backends/cuda/triton/tuning/*.json` for the GPU at hand.

    python -m et_moe.benchmarks tune --pack kernels.zip --gpu "NVIDIA H200" --tables linear_w4a8
    python -m et_moe.benchmarks tune --packed kernels.zip --tables linear_w4a8

The first command compiles the kernels where programs are made, the second one times them on the
GPU. Without both files, the kernels that are timed are those of the GPU machine's own Triton.

For every table, and every size by which the cases of its ops look it up, each candidate (and the
configuration in use) is timed inside its op; the fastest becomes an entry of this GPU's, or, where
the order of additions must be one for all sizes, the fastest of that order. What is not packed is
compiled first, on all cores, into Triton's cache: that takes longer than the timing. Kernels are
launched as in a program, where one call's weights are under way before the call before it ends.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import torch

from et_moe.backends.atomic_file import write_file
from et_moe.backends.cuda.gpu import Gpu
from et_moe.backends.cuda.triton import tuning
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.cases.lookups import record_lookups
from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.cases.table import ONE_ORDER, OP_CASES, TUNING_CANDIDATES
from et_moe.benchmarks.packed_kernels import PackedKernels, launched_from, pack_kernels
from et_moe.benchmarks.static.collect import Job, job_of
from et_moe.benchmarks.timing import launched_as_in_programs, microseconds, require_gpu, rotated


def uses(table: str, counts: list[int]) -> dict[int, list]:
    """Size -> (case, tokens) that look up a configuration of `table` for it."""
    users = collections.defaultdict(list)
    for case in (case for case in OP_CASES if table in case.tables):
        fewest, most = min(case.tokens), max(case.tokens)
        for m in [m for m in counts if fewest <= m <= most] if fewest < most else case.tokens:
            with record_lookups() as lookups, record_launches():
                case.op(**case.arguments(m, torch.device("meta")))
            for size in {lookup.size for lookup in lookups if lookup.table == table}:
                users[size].append((case, m))
    return users


@contextlib.contextmanager
def configured(table: str, config: dict[str, int]):
    """Every lookup in `table` gives `config`."""
    original = tuning.read_table

    def changed(name: str) -> tuning.Table:
        found = original(name)
        only = {"default": [tuning.Entry(None, config)]}
        return tuning.Table(found.key, only) if name == table else found

    with mock.patch.object(tuning, "read_table", changed):
        yield


@functools.lru_cache(maxsize=1)  # experts have gigabytes, in each process
def example(name: str, m: int) -> tuple[OpCase, dict]:
    """A case and its arguments on the GPU."""
    case = next(case for case in OP_CASES if case.name == name)
    return case, case.arguments(m, torch.device("cuda"))


def compile_one(table: str, config: dict, name: str, m: int) -> None:
    """Calls an op once; what this GPU cannot run is reported when it is timed."""
    case, arguments = example(name, m)
    with configured(table, config), launched_as_in_programs(), contextlib.suppress(Exception):
        case.op(**arguments)


def compile_all(jobs: list[tuple[str, dict, str, int]]) -> None:
    """`compile_one` of all jobs, in as many processes as there are cores."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        futures = [pool.submit(compile_one, *job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BrokenProcessPool:
            print("the compiler crashed: what is missing is compiled when it is timed")


def configurations(table: str, size: int) -> list[dict]:
    """The configuration in use, then the other candidates."""
    current = tuning.find_config(table, **{tuning.read_table(table).key: size})
    return [current, *(c for c in TUNING_CANDIDATES[table] if c != current)]


def time_candidates(
    table: str, size: int, inputs: list, launched: Callable[[], contextlib.AbstractContextManager]
) -> list[tuple[dict, float]]:
    """(configuration, its time summed over `inputs`) of the one in use, then of those that run.

    launched: makes a block in which ops launch the kernels that are timed.
    """
    times = []
    for config in configurations(table, size):
        total = 0.0
        try:
            with configured(table, config), launched():
                for case, sets in inputs:
                    total += microseconds([lambda s=s, c=case: c.op(**s) for s in sets])
        except Exception as e:  # a configuration that this GPU cannot run is only not chosen
            print(f"  {config}: {type(e).__name__} {str(e)[:100]}")
            continue
        times.append((config, total))
        print(f"  {config}: {total:.2f} us")
    if not times:
        raise RuntimeError(f"{table}: no configuration runs for {size}")
    return times


def choose(times: dict[int, list[tuple[dict, float]]], shared: tuple[str, ...]) -> dict[int, dict]:
    """Size -> the fastest of its configurations, among those that agree in the keys `shared`.

    The values of `shared` are those with the least mean of times over the fastest of their size.
    """
    fastest = {size: min(time for _, time in found) for size, found in times.items()}
    groups: dict[tuple, dict[int, tuple[float, dict]]] = collections.defaultdict(dict)
    for size, found in times.items():
        for config, time in found:
            group = groups[tuple(config[key] for key in shared)]
            if size not in group or time < group[size][0]:
                group[size] = (time, config)
    whole = [group for group in groups.values() if len(group) == len(times)]
    if not whole:
        raise RuntimeError(f"no configurations that agree in {shared} run for all of {list(times)}")
    group = min(whole, key=lambda g: sum(time / fastest[size] for size, (time, _) in g.items()))
    return {size: config for size, (_, config) in group.items()}


def merge(found: dict[int, dict]) -> list[tuning.Entry]:
    """Entries from size -> configuration; neighbours that agree become one."""
    entries: list[tuning.Entry] = []
    for size, config in sorted(found.items()):
        if entries and entries[-1].config == config:
            entries.pop()
        entries.append(tuning.Entry(size, config))
    entries[-1] = dataclasses.replace(entries[-1], bound=None)
    return entries


def format_table(table: tuning.Table) -> str:
    """The JSON text of a table, one line an entry."""
    blocks = []
    for gpu, entries in table.entries.items():
        rows = ({f"max_{table.key}": entry.bound, "config": entry.config} for entry in entries)
        lines = ",\n".join(f"      {json.dumps(row)}" for row in rows)
        blocks.append(f"    {json.dumps(gpu)}: [\n{lines}\n    ]")
    entries = "{\n" + ",\n".join(blocks) + "\n  }"
    return f'{{\n  "key": {json.dumps(table.key)},\n  "entries": {entries}\n}}\n'


def save(name: str, gpu: str, entries: list[tuning.Entry]) -> None:
    """Writes the entries of one GPU, leaving the others as they are."""
    table, path = tuning.read_table(name), tuning.FOLDER / f"{name}.json"
    changed = dataclasses.replace(table, entries=table.entries | {gpu: entries})
    write_file(path, format_table(changed).encode())
    tuning.read_table.cache_clear()


def choose_tables(tables: list[str] | None) -> list[str]:
    """All tables for None.

    Raises:
        SystemExit: there are no candidates for one of the names.
    """
    if unknown := set(tables or ()) - set(TUNING_CANDIDATES):
        known = sorted(TUNING_CANDIDATES)
        raise SystemExit(f"no candidates for {sorted(unknown)}: expected of {known}")
    return tables or list(TUNING_CANDIDATES)


def pack_tables(
    gpu: Gpu, tables: list[str] | None, counts: list[int], path: Path, processes: int
) -> None:
    """Packs what `tune_tables` launches on a GPU for the same tables and counts into a file."""
    jobs: list[Job] = []
    with tuning.tuning_target(gpu.name, gpu.arch):
        for table in choose_tables(tables):
            for size, calls in uses(table, counts).items():
                for config in configurations(table, size):
                    for case, m in calls:
                        with configured(table, config), record_launches() as launches:
                            case.op(**case.arguments(m, torch.device("meta")))
                        jobs += [job_of(launch, gpu.arch) for launch in launches]
    for fault in pack_kernels(jobs, path, processes):
        print(f"not packed: {fault}")
    print(f"packed {len(set(jobs))} kernels into {path}, {path.stat().st_size >> 20} MiB")


def tune_tables(
    tables: list[str] | None, counts: list[int], dry_run: bool, packed: Path | None = None
) -> None:
    """Tunes on the first GPU, and writes entries under its name unless it is a `dry_run`.

    Args:
        tables: names, or None for all.
        counts: numbers of tokens to tune for.
        packed: a file of `pack_tables` with the kernels; by default they are compiled here.
    """
    chosen = choose_tables(tables)
    kernels = None if packed is None else PackedKernels(packed)
    device = require_gpu()
    gpu = torch.cuda.get_device_name()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    work = {table: uses(table, counts) for table in chosen}
    launched: Callable[[], contextlib.AbstractContextManager] = launched_as_in_programs
    if kernels:
        launched = functools.partial(launched_from, kernels)
    else:
        compile_all(
            [
                (table, config, case.name, m)
                for table, users in work.items()
                for calls in users.values()
                for case, m in calls
                for config in TUNING_CANDIDATES[table]
            ]
        )
    for table, users in work.items():
        times = {}
        for size, calls in sorted(users.items()):
            print(f"{table}, {size}:")
            inputs = [(c, rotated(lambda c=c, m=m: c.arguments(m, device), l2)) for c, m in calls]
            times[size] = time_candidates(table, size, inputs, launched)
        found = choose(times, ONE_ORDER.get(table, ()))
        for size, config in found.items():
            before, after = times[size][0][1], next(t for c, t in times[size] if c == config)
            print(f"{table}, {size}: {before:.2f} -> {after:.2f} us with {config}", flush=True)
        if not dry_run:
            save(table, gpu, merge(found))
