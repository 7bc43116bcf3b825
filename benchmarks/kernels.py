"""Times all kernels against those of the installed ExecuTorch wheel and the GPU's roof.

The wheel's are `executorch.backends.cuda.triton.kernels` (its delta rule needs
`flash-linear-attention==0.4.2`), called as its own Qwen3.5 example does. All run in this process on
the same shapes, as CUDA graphs, with inputs rotated past the L2 cache; times are medians. Ours
start as in a program, where possible before their predecessor ends; the wheel's have no means for
that. For few tokens the time of reading alone is measured, too (`stream_floor`).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from et_moe.benchmarks.report.kernels import cells, compare
from et_moe.benchmarks.result import provenance, write_result
from et_moe.benchmarks.stream_floor import Floor
from et_moe.benchmarks.subjects import Subject, bf16, load_wheel, subjects
from et_moe.benchmarks.timing import launched_as_in_programs, microseconds, require_gpu, rotated

FLOOR_TOKENS = 16
"""Up to this number of tokens a row has the time of reading alone. With more tokens a kernel moves
so much that the GPU's bandwidth is within its reach."""


def measure_roof(device: torch.device) -> dict[str, float]:
    """What the GPU reaches: `bandwidth` in bytes per second, `int8` and `bf16` in operations per
    second.

    Bandwidth is that of an elementwise kernel: a copy in a CUDA graph is not done by a kernel, and
    is slower. The operations are those of cuBLAS.
    """
    source = torch.zeros(1 << 29, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    us = microseconds([lambda: torch.add(source, 1, out=target)])
    roof = {"bandwidth": 2 * source.nbytes / us * 1e6, "int8": 0.0, "bf16": 0.0}
    for size in (8192, 16384):
        a = torch.randint(-127, 127, (size, size), dtype=torch.int8, device=device)
        b = bf16(size, size, device=device)
        for name, product in (
            ("int8", lambda a=a: torch._int_mm(a, a.t())),
            ("bf16", lambda b=b: b @ b),
        ):
            roof[name] = max(roof[name], 2 * size**3 / microseconds([product]) * 1e6)
    return roof


def run(subject: Subject, tokens: list[int], roof: dict, floor: Floor) -> Iterator[dict]:
    """Yields a row for each number of tokens and each contender that takes it."""
    for m in tokens:
        kernels = subject.cost(m)
        least = sum(k.seconds(**roof) for k in kernels) * 1e6
        contenders = [c for c in subject.contenders if c.takes(m)]
        reading = floor(kernels) if contenders and m <= FLOOR_TOKENS else None
        for contender in contenders:
            row = {"subject": subject.name, "m": m, "kernel": contender.name}
            row |= {"peer": contender.peer, "part": contender.part}
            row |= {"roof_us": least, "floor_us": reading}
            try:
                sets = rotated(lambda c=contender, m=m: c.arguments(m), floor.l2_bytes)
                calls = [lambda s=s, c=contender: c.call(**s) for s in sets]
                with contextlib.nullcontext() if contender.peer else launched_as_in_programs():
                    row["us"] = microseconds(calls)
            except Exception as e:  # one kernel that fails must not end the comparison
                row["error"] = f"{type(e).__name__}: {str(e)[:200]}"
            torch.cuda.empty_cache()
            yield row


def measure(out: Path, tokens: list[int], only: str, seconds: float) -> None:
    """Measures on the first GPU, and writes `out` after each subject.

    Args:
        tokens: the numbers of tokens to measure with.
        only: subjects whose names do not contain this are left out.
        seconds: after this time nothing more is measured, and a message says so.
    """
    device, begin = require_gpu(), time.monotonic()
    floor = Floor(device, torch.cuda.get_device_properties(0).L2_cache_size)
    wheel, roof = load_wheel(), measure_roof(device)
    rows: list[dict] = []
    result = provenance() | {"roof": roof, "rows": rows}
    for subject in subjects(device, wheel, only):
        for row in run(subject, tokens, roof, floor):
            rows.append(row)
            shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
            print(shown, flush=True)
            if time.monotonic() - begin > seconds:
                break
        write_result(out, result)
        if time.monotonic() - begin > seconds:
            print(f"stopped after {seconds} s; what follows {subject.name} was not measured")
            break
    table = Table("what", "M", "kernel", "us", "wheel", "us", "speedup", "of roof", "of floor")
    for line in compare(rows):
        table.add_row(*cells(line))
    Console(width=140).print(table)
