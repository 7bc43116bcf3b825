"""Our kernels against the wheel's: the comparison, and its part of the page."""

from collections.abc import Callable
from pathlib import Path

from et_moe.benchmarks.report.markdown import source, table
from et_moe.benchmarks.report.plots import drawing

FIGURES: dict[str, Callable[[dict], str]] = {
    "us": lambda line: f"{line['us']:.1f}",
    "wheel's best, us": lambda line: f"{line['peer_us']:.1f}" if line["peer"] else "",
    "times as fast": lambda line: f"{line['peer_us'] / line['us']:.2f}" if line["peer"] else "",
    "part of the work by the wheel, us": lambda line: (
        f"{line['part_us']:.1f}" if line["part"] else ""
    ),
    "of roof": lambda line: f"{line['roof_us'] / line['us']:.0%}",
    "of floor": lambda line: f"{line['floor_us'] / line['us']:.0%}" if line["floor_us"] else "",
}
"""What is said of a line of `compare`; empty where it was not measured."""


def _fastest(rows: list[dict], peer: bool, part: bool) -> dict | None:
    kind = [row for row in rows if (row["peer"], row["part"]) == (peer, part)]
    return min(kind, key=lambda row: row["us"], default=None)


def compare(rows: list[dict]) -> list[dict]:
    """Per subject and number of tokens m: our fastest, the wheel's fastest that does the same work,
    the fastest of its that do a part of it, and the bounds."""
    lines = []
    for key in dict.fromkeys((row["subject"], row["m"]) for row in rows):
        timed = [r for r in rows if (r["subject"], r["m"]) == key and "us" in r]
        ours = _fastest(timed, peer=False, part=False)
        if ours is None:
            continue
        line = {"subject": key[0], "m": key[1], "kernel": ours["kernel"], "us": ours["us"]}
        line |= {"roof_us": ours["roof_us"], "floor_us": ours["floor_us"]}
        for name, part in (("peer", False), ("part", True)):
            found = _fastest(timed, peer=True, part=part)
            line |= {name: found["kernel"] if found else None}
            line |= {f"{name}_us": found["us"] if found else None}
        lines.append(line)
    return lines


COLUMNS = ("what", "M", "kernel", "us", "wheel", "us", "speedup", "of roof", "of floor")


def cells(line: dict) -> list[str]:
    """A line of `compare` as text, in the order of `COLUMNS`."""
    us, peer_us, speedup, _, roof, floor = (figure(line) for figure in FIGURES.values())
    names = [line["subject"], str(line["m"]), line["kernel"]]
    return [*names, us, line["peer"] or "", peer_us, speedup, roof, floor]


def condense(result: dict) -> dict:
    """What the page needs of a result of the command `kernels`."""
    return {k: v for k, v in result.items() if k != "rows"} | {"lines": compare(result["rows"])}


def _figures(lines: list[dict]) -> list[list[str]]:
    """A row a subject and figure, with a cell a number of tokens."""
    counts = sorted({line["m"] for line in lines})
    rows = []
    for subject in dict.fromkeys(line["subject"] for line in lines):
        by_count = {line["m"]: line for line in lines if line["subject"] == subject}
        for name, figure in FIGURES.items():
            found = [figure(by_count[m]) if m in by_count else "" for m in counts]
            if any(found):
                rows.append([subject if name == "us" else "", name, *found])
    return rows


def _names(lines: list[dict]) -> list[str]:
    """Which kernels were the fastest, a line a subject."""
    text = []
    for subject in dict.fromkeys(line["subject"] for line in lines):
        mine = [line for line in lines if line["subject"] == subject]
        ours, peers, parts = (
            ", ".join(dict.fromkeys(f"`{line[key]}`" for line in mine if line[key]))
            for key in ("kernel", "peer", "part")
        )
        against = f" against {peers}" if peers else ""
        only = f"; a part of the work: {parts}" if parts else ""
        text.append(f"- {subject}: {ours}{against}{only}")
    return text


def section(result: dict) -> list[str]:
    """Markdown of a condensed result."""
    roof, lines = result["roof"], result["lines"]
    counts = sorted({line["m"] for line in lines})
    return [
        "## Kernels against the ExecuTorch wheel's",
        "",
        *source(result),
        f"Measured roof: {roof['bandwidth'] / 1e12:.2f} TB/s, {roof['int8'] / 1e12:.0f} TOPS INT8, "
        f"{roof['bf16'] / 1e12:.0f} TFLOPS bf16. Times are medians of replayed CUDA graphs whose "
        "inputs are rotated past the L2 cache; columns are numbers of tokens. Ours are launched as "
        'in a program (programmatic dependent launch). "Of roof" is the least time that bytes and '
        'operations allow, over ours; "of floor" the time of as many launches that only read as '
        "many bytes, over ours. Attention is compared with all that the wheel's own Qwen3.5 module "
        "does between the projections (QK-norm, RoPE, cache update, SDPA over the whole cache, "
        "gate), compiled by torch.compile; its SDPA kernel alone does a part of that.",
        "",
        *table(("what", "figure", *map(str, counts)), _figures(lines), text_columns=2),
        "",
        *_names(lines),
        "",
        "![microseconds over the number of tokens](images/kernels.png)",
    ]


def plot(result: dict, path: Path) -> None:
    """Time over the number of tokens, a panel a subject."""
    lines = result["lines"]
    names = [n for n in dict.fromkeys(line["subject"] for line in lines) if n != "sample"]
    rows = -(-len(names) // 3)
    with drawing(path, rows, 3, figsize=(15, 4 * rows)) as (_, panels):
        for panel in panels.flat[len(names) :]:
            panel.axis("off")
        for panel, name in zip(panels.flat, names, strict=False):
            mine = [line for line in lines if line["subject"] == name]
            for key, label, style in (
                ("us", "ours", "C0-"),
                ("peer_us", "the wheel's", "C1--"),
                ("part_us", "the wheel's, a part", "C2--"),
                ("roof_us", "roof", "k:"),
                ("floor_us", "floor", "C7:"),
            ):
                points = [(line["m"], line[key]) for line in mine if line[key]]
                if points:
                    panel.plot(*zip(*points, strict=True), style, marker=".", label=label)
            panel.set(title=name, xscale="log", yscale="log", xlabel="tokens", ylabel="us")
            panel.legend(fontsize=7)
