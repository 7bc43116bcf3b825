"""The server beside the runner, as a part of the page."""

from et_moe.benchmarks.report.markdown import source, table

COLUMNS = ("sequences", "requests", "prompt", "new", "figure", "runner", "server", "ratio")
_FIGURES = (
    ("output tok/s", "output_token_per_sec"),
    ("decode tok/s", "decode_token_per_sec"),
    ("first token ms", "time_to_first_token_ms_median"),
)


def cells(row: dict) -> list[list[str]]:
    """The lines of a row of a result of the command `overhead`, in the columns of `COLUMNS`."""
    head = [f"{row[name]:,}" for name in ("sequences", "requests", "prompt", "new_tokens")]
    if "error" in row:
        return [[*head, row["error"], "", "", ""]]
    lines = []
    for title, name in _FIGURES:
        runner, server = row["runner"].get(name), row["server"].get(name)
        if runner and server:
            lines.append(
                [*head, title, f"{runner:,.1f}", f"{server:,.1f}", f"{server / runner:.1%}"]
            )
    used = row["server"]["cpu_us_per_token"]
    return [*lines, [*head, "server's CPU time, us a token", "", f"{used:,.0f}", ""]]


def section(result: dict) -> list[str]:
    """Markdown of a result of the command `overhead`."""
    return [
        "## The server beside the runner",
        "",
        "The same requests, all at once: by the runner's `--prompts_path`, and streamed from "
        "`/v1/completions` of `et-moe serve`, each over a connection of its own. A first token "
        "counts from when requests are sent until the first event is there. The server's CPU time "
        "has that of the engine's thread, which waits for the GPU.",
        "",
        *source(result),
        *table(COLUMNS, [line for row in result["rows"] for line in cells(row)], text_columns=0),
    ]
