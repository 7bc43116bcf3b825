"""Many sequences at once, as a part of the page."""

from pathlib import Path

from et_moe.benchmarks.report.markdown import source, table
from et_moe.benchmarks.report.plots import drawing

COLUMNS = (
    "sequences",
    "requests",
    "prompt",
    "new",
    "output tok/s",
    "step ms, median (p99)",
    "tok/s of full steps",
    "of the roof",
    "first token ms, median (p99)",
)
LISTED = 12
"""Kernels of a profile that are listed, the slowest first."""


def step_rate(row: dict) -> float:
    """Tokens a second while all sequences decode."""
    return 1e3 * row["sequences"] / row["time_between_tokens_ms_median"]


def cells(row: dict) -> list[str]:
    """A row of a result of the command `batch` in the columns of `COLUMNS`."""
    head = [f"{row[name]:,}" for name in ("sequences", "requests", "prompt", "new_tokens")]
    if "error" in row:
        return [*head, row["error"], *[""] * (len(COLUMNS) - len(head) - 1)]
    first, step = (_time(row, name) for name in ("time_to_first_token", "time_between_tokens"))
    rate = share = ""
    if step:
        rate = f"{step_rate(row):,.0f}"
    if step and "roof_ms" in row:
        share = f"{row['roof_ms'] / row['time_between_tokens_ms_median']:.0%}"
    return [*head, f"{row['output_token_per_sec']:,.0f}", step, rate, share, first]


def _time(row: dict, name: str) -> str:
    """A median and, in brackets, the 99th percentile; nothing where the runner measured none."""
    median, most = row[f"{name}_ms_median"], row[f"{name}_ms_p99"]
    return "" if median is None else f"{median:,.1f} ({most:,.1f})"


def _profiles(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        if "profile" not in row:
            continue
        profile, title = row["profile"], f"a step of {row['sequences']} sequences"
        if "error" in profile:
            lines += ["", f"Not profiled: {title}: {profile['error']}"]
            continue
        lines += ["", f"Kernels of {title}: {profile['launches']} launches, "]
        lines[-1] += f"{profile['kernels_us']:,.0f} us; the slowest:"
        kernels = [
            (f"`{k['name']}`", str(k["launches"]), f"{k['us']:.1f}", f"{k['share']:.1%}")
            for k in profile["kernels"][:LISTED]
        ]
        lines += ["", *table(("kernel", "launches", "us", "share"), kernels)]
    return lines


def section(result: dict) -> list[str]:
    """Markdown of a result of the command `batch`."""
    return [
        "## Many sequences at once",
        "",
        "Random prompts, all submitted at once. Output tokens count from the start, with all "
        "prompts. A step is the time between two tokens of a sequence; the roof of a step in which "
        "all decode is in `batch_step` of `benchmarks/roofline.py`. Where there are more requests "
        "than sequences, each asks for half to one and a half times the new tokens, and prompts "
        "are fed while others decode.",
        "",
        *source(result),
        *table(COLUMNS, map(cells, result["rows"]), text_columns=0),
        *_profiles(result["rows"]),
        "",
        "![Throughput against sequences](images/batch.png)",
    ]


def plot(result: dict, path: Path) -> None:
    """Tokens a second of full steps against the number of sequences, and the roof; of the loads
    that have the prompts of the first one."""
    rows = [row for row in result["rows"] if row.get("time_between_tokens_ms_median")]
    rows = [row for row in rows if row["prompt"] == rows[0]["prompt"]]
    counts = [row["sequences"] for row in rows]
    with drawing(path, 1, 1, figsize=(6, 4)) as (_, panels):
        panel = panels[0, 0]
        panel.plot(counts, list(map(step_rate, rows)), "o-", label="measured")
        if all("roof_ms" in row for row in rows):
            roof = [1e3 * row["sequences"] / row["roof_ms"] for row in rows]
            panel.plot(counts, roof, "--", label="roof")
        panel.set(xlabel="sequences", ylabel="decoded tokens a second", xscale="log", yscale="log")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.legend()
