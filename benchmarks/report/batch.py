"""Many sequences at once, as a part of the page."""

from pathlib import Path

from et_moe.benchmarks.report.markdown import source, table
from et_moe.benchmarks.report.plots import drawing

COLUMNS = (
    "sequences",
    "output tok/s",
    "decode tok/s",
    "of the roof",
    "first token ms, median (p99)",
    "between tokens ms, median (p99)",
)


def cells(row: dict) -> list[str]:
    """A row of a result of the command `batch` in the columns of `COLUMNS`."""
    if "error" in row:
        return [str(row["sequences"]), row["error"], *[""] * (len(COLUMNS) - 2)]
    times = [_time(row, name) for name in ("time_to_first_token", "time_between_tokens")]
    share = f"{row['of_roof']:.0%}" if "of_roof" in row else ""
    rates = [f"{row[f'{name}_token_per_sec']:,.0f}" for name in ("output", "decode")]
    return [str(row["sequences"]), *rates, share, *times]


def _time(row: dict, name: str) -> str:
    """A median and, in brackets, the 99th percentile; nothing where the runner measured none."""
    median, most = row[f"{name}_ms_median"], row[f"{name}_ms_p99"]
    return "" if median is None else f"{median:,.1f} ({most:,.1f})"


def section(result: dict) -> list[str]:
    """Markdown of a result of the command `batch`."""
    return [
        "## Many sequences at once",
        "",
        f"Prompts of {result['prompt']:,} random tokens, all in flight at once, and "
        f"{result['new_tokens']} tokens after each. Output tokens count from the start, with all "
        "prompts; decoded tokens from when the last prompt is done. The roof of a step is in "
        "`batch_step` of `benchmarks/roofline.py`.",
        "",
        *source(result),
        *table(COLUMNS, map(cells, result["rows"]), text_columns=0),
        "",
        "![Throughput against sequences](images/batch.png)",
    ]


def plot(result: dict, path: Path) -> None:
    """Decoded tokens a second against the number of sequences, and the roof."""
    rows = [row for row in result["rows"] if "error" not in row]
    counts = [row["sequences"] for row in rows]
    with drawing(path, 1, 1, figsize=(6, 4)) as (_, panels):
        panel = panels[0, 0]
        panel.plot(counts, [row["decode_token_per_sec"] for row in rows], "o-", label="measured")
        if all("of_roof" in row for row in rows):
            roof = [row["decode_token_per_sec"] / row["of_roof"] for row in rows]
            panel.plot(counts, roof, "--", label="roof")
        panel.set(xlabel="sequences", ylabel="decoded tokens a second", xscale="log", yscale="log")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.legend()
