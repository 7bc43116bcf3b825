"""Times all kernels against those of the installed ExecuTorch wheel and the GPU's roofline.

    python -m et_moe.benchmarks.kernels --out benchmarks/kernels

The wheel's are `executorch.backends.cuda.triton.kernels` (its delta rule needs
`flash-linear-attention==0.4.2`), called as its own Qwen3.5 example does. All run in this process on
the same shapes, as CUDA graphs, with inputs rotated past the L2 cache; times are medians. Ours
start as in a program, where possible before their predecessor ends; the wheel's have no means for
that. For few tokens a floor is measured too (`stream_floor`). Writes `<out>.json`, `.md`, `.png`.
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
from rich.console import Console
from rich.table import Table

from et_moe.benchmarks.gpu_timing import launched_as_in_programs, microseconds, require_gpu, rotated
from et_moe.benchmarks.plotting import pyplot
from et_moe.benchmarks.stream_floor import Floor
from et_moe.benchmarks.subjects import Subject, bf16, load_wheel, subjects

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,1600,2048,4095"
FLOOR_TOKENS = 16
"""Up to here a row has the time of reading alone: further on bandwidth is within reach."""


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


def run(subject: Subject, tokens: list[int], roof: dict, floor: Floor) -> Iterator[dict]:
    """A row per number of tokens and contender."""
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


def compare(rows: list[dict]) -> list[dict]:
    """Per subject and m: our fastest, the wheel's fastest that does the same work, the fastest of
    its that do a part of it, and the bounds."""
    lines = []
    for key in dict.fromkeys((row["subject"], row["m"]) for row in rows):
        timed = [r for r in rows if (r["subject"], r["m"]) == key and "us" in r]

        def fastest(peer: bool, part: bool, timed: list[dict] = timed) -> dict | None:
            kind = [r for r in timed if (r["peer"], r["part"]) == (peer, part)]
            return min(kind, key=lambda r: r["us"], default=None)

        ours, peer, part = fastest(False, False), fastest(True, False), fastest(True, True)
        if ours:
            floor = ours["floor_us"]
            lines.append(
                {
                    "subject": key[0],
                    "m": key[1],
                    "kernel": ours["kernel"],
                    "us": ours["us"],
                    "peer": peer["kernel"] if peer else None,
                    "peer_us": peer["us"] if peer else None,
                    "speedup": peer["us"] / ours["us"] if peer else None,
                    "part": part["kernel"] if part else None,
                    "part_us": part["us"] if part else None,
                    "of_roof": ours["roof_us"] / ours["us"],
                    "of_floor": floor / ours["us"] if floor else None,
                }
            )
    return lines


def cells(line: dict) -> list[str]:
    """A line of `compare` as text."""
    peer = ["", "", ""]
    if line["peer"]:
        peer = [line["peer"], f"{line['peer_us']:.1f}", f"{line['speedup']:.2f}"]
    ours = [line["subject"], str(line["m"]), line["kernel"], f"{line['us']:.1f}"]
    floor = f"{line['of_floor']:.0%}" if line["of_floor"] else ""
    return [*ours, *peer, f"{line['of_roof']:.0%}", floor]


def parts(lines: list[dict]) -> list[str]:
    """What of the wheel's does only a part of what ours does, as Markdown."""
    text = [
        f"| {line['subject']} | {line['m']} | {line['part']} | {line['part_us']:.1f} |"
        for line in lines
        if line["part"]
    ]
    if not text:
        return []
    head = "Kernels of the wheel that do only a part of the work (they do not count above):"
    return ["", head, "", "| what | M | kernel | us |", "|---|--:|---|--:|", *text]


def report(lines: list[dict], result: dict) -> str:
    """Markdown."""
    roof = result["roof"]
    text = [
        f"# Kernels on {result['gpu']}",
        "",
        f"`python -m et_moe.benchmarks.kernels`, torch {result['torch']}, "
        f"triton {result['triton']}, "
        f"ExecuTorch {result['executorch']}. Measured roof: {roof['bandwidth'] / 1e12:.2f} TB/s, "
        f"{roof['int8'] / 1e12:.0f} TOPS INT8, {roof['bf16'] / 1e12:.0f} TFLOPS bf16. Times in "
        "microseconds, medians of graph replays with inputs rotated past the L2 cache; ours are "
        'launched as in a program (programmatic dependent launch). "Of floor" (up to '
        f"{FLOOR_TOKENS} tokens) is the share of our time that as many launches take that only "
        "read as many bytes, launched and timed likewise (`benchmarks/stream_floor.py`). The "
        "speedup "
        "is over what of the wheel's does the same work: for attention what its example's module "
        "does between the projections (QK-norm, RoPE, cache update, sdpa over the whole cache, "
        "gate), compiled by torch.compile; its sdpa alone is listed at the end.",
        "",
        "| what | M | kernel | us | wheel's best | us | speedup | of roof | of floor |",
        "|---|--:|---|--:|---|--:|--:|--:|--:|",
    ]
    text += ["| " + " | ".join(cells(line)) + " |" for line in lines]
    return "\n".join([*text, *parts(lines)]) + "\n"


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
        for bound, color in (("roof", "black"), ("floor", "gray")):
            least = {r["m"]: r[f"{bound}_us"] for r in mine if r[f"{bound}_us"]}
            panel.plot(list(least), list(least.values()), ":", color=color, label=bound)
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
    floor = Floor(device, torch.cuda.get_device_properties(0).L2_cache_size)
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
        for row in run(subject, counts, roof, floor):
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
    table = Table("what", "M", "kernel", "us", "wheel", "us", "speedup", "of roof", "of floor")
    for line in lines:
        table.add_row(*cells(line))
    Console(width=140).print(table)
    out.with_suffix(".md").write_text(report(lines, result))
    if rows:
        plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
