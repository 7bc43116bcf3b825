"""Times all kernels against those of the installed ExecuTorch wheel and the GPU's roofline.

    python scripts/bench_kernels.py --out benchmarks/kernels

The wheel's are `executorch.backends.cuda.triton.kernels` (its delta rule needs
`flash-linear-attention==0.4.2`), called as its own Qwen3.5 example does. All run in this process on
the same shapes, as CUDA graphs, with inputs rotated past the L2 cache; times are medians. Ours
start as in a program, where possible before their predecessor ends; the wheel's have no means for
that. Writes `<out>.json`, `.md` and `.png`.
"""

import contextlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from bench_subjects import Subject, bf16, load_wheel, subjects
from gpu_timing import launched_as_in_programs, microseconds, require_gpu, rotated
from plotting import pyplot
from rich.console import Console
from rich.table import Table

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,1600,2048,4095"


def measure_roof(device: torch.device) -> dict[str, float]:
    """Bytes per second of an elementwise kernel (in a CUDA graph a copy is no kernel, and slower),
    INT8 and bf16 operations per second of cuBLAS."""
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


def run(subject: Subject, tokens: list[int], roof: dict, l2: int) -> Iterator[dict]:
    """A row per number of tokens and contender."""
    for m in tokens:
        kernels = subject.cost(m)
        least = sum(k.seconds(**roof) for k in kernels) * 1e6
        for contender in (c for c in subject.contenders if c.takes(m)):
            row = {"subject": subject.name, "m": m, "kernel": contender.name}
            row |= {"peer": contender.peer, "roof_us": least}
            try:
                sets = rotated(lambda c=contender, m=m: c.arguments(m), l2)
                calls = [lambda s=s, c=contender: c.call(**s) for s in sets]
                with contextlib.nullcontext() if contender.peer else launched_as_in_programs():
                    row["us"] = microseconds(calls)
            except Exception as e:  # one kernel that fails must not end the comparison
                row["error"] = f"{type(e).__name__}: {str(e)[:200]}"
            torch.cuda.empty_cache()
            yield row


def compare(rows: list[dict]) -> list[dict]:
    """Per subject and m: our fastest, the wheel's fastest, and the roof."""
    lines = []
    for key in dict.fromkeys((row["subject"], row["m"]) for row in rows):
        timed = [r for r in rows if (r["subject"], r["m"]) == key and "us" in r]
        ours = min((r for r in timed if not r["peer"]), key=lambda r: r["us"], default=None)
        peer = min((r for r in timed if r["peer"]), key=lambda r: r["us"], default=None)
        if ours:
            lines.append(
                {
                    "subject": key[0],
                    "m": key[1],
                    "kernel": ours["kernel"],
                    "us": ours["us"],
                    "peer": peer["kernel"] if peer else None,
                    "peer_us": peer["us"] if peer else None,
                    "speedup": peer["us"] / ours["us"] if peer else None,
                    "of_roof": ours["roof_us"] / ours["us"],
                }
            )
    return lines


def cells(line: dict) -> list[str]:
    """A line of `compare` as text."""
    peer = ["", "", ""]
    if line["peer"]:
        peer = [line["peer"], f"{line['peer_us']:.1f}", f"{line['speedup']:.2f}"]
    ours = [line["subject"], str(line["m"]), line["kernel"], f"{line['us']:.1f}"]
    return [*ours, *peer, f"{line['of_roof']:.0%}"]


def report(lines: list[dict], result: dict) -> str:
    """Markdown."""
    roof = result["roof"]
    text = [
        f"# Kernels on {result['gpu']}",
        "",
        f"`python scripts/bench_kernels.py`, torch {result['torch']}, triton {result['triton']}, "
        f"ExecuTorch {result['executorch']}. Measured roof: {roof['bandwidth'] / 1e12:.2f} TB/s, "
        f"{roof['int8'] / 1e12:.0f} TOPS INT8, {roof['bf16'] / 1e12:.0f} TFLOPS bf16. Times in "
        "microseconds, medians of graph replays with inputs rotated past the L2 cache; ours are "
        "launched as in a program (programmatic dependent launch).",
        "",
        "| what | M | kernel | us | wheel's best | us | speedup | of roof |",
        "|---|--:|---|--:|---|--:|--:|--:|",
    ]
    for line in lines:
        text.append("| " + " | ".join(cells(line)) + " |")
    return "\n".join(text) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Time over M, a panel per subject."""
    plt = pyplot()
    if plt is None:
        return
    names = [n for n in dict.fromkeys(r["subject"] for r in rows) if n != "sample"]
    figure, panels = plt.subplots(
        -(-len(names) // 3), 3, figsize=(15, 4 * -(-len(names) // 3)), squeeze=False
    )
    for panel, name in zip(panels.flat, names, strict=False):
        mine = [r for r in rows if r["subject"] == name and "us" in r]
        for kernel in dict.fromkeys(r["kernel"] for r in mine):
            line = [r for r in mine if r["kernel"] == kernel]
            style = "--" if line[0]["peer"] else "-"
            panel.plot(
                [r["m"] for r in line], [r["us"] for r in line], style, marker=".", label=kernel
            )
        least = {r["m"]: r["roof_us"] for r in mine}
        panel.plot(list(least), list(least.values()), ":", color="black", label="roof")
        panel.set(title=name, xscale="log", yscale="log", xlabel="M", ylabel="us")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/kernels"
    ),
    tokens: Annotated[str, typer.Option(help="Values of M.")] = TOKENS,
    only: Annotated[str, typer.Option(help="Only subjects whose name contains this.")] = "",
    seconds: Annotated[float, typer.Option(help="Stop measuring after this time.")] = 1e9,
) -> None:
    """Measures on the first GPU."""
    device, begin = require_gpu(), time.monotonic()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    wheel, roof = load_wheel(), measure_roof(device)
    counts = [int(m) for m in tokens.split(",")]
    rows: list[dict] = []
    result = {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "executorch": _version("executorch"),
        "roof": roof,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for subject in subjects(device, wheel, only):
        for row in run(subject, counts, roof, l2):
            rows.append(row)
            print(
                {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )
            if time.monotonic() - begin > seconds:
                break
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        if time.monotonic() - begin > seconds:
            print(f"stopped after {seconds} s; what follows {subject.name} was not measured")
            break
    lines = compare(rows)
    table = Table("what", "M", "kernel", "us", "wheel", "us", "speedup", "of roof")
    for line in lines:
        table.add_row(*cells(line))
    Console(width=140).print(table)
    out.with_suffix(".md").write_text(report(lines, result))
    if rows:
        plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
