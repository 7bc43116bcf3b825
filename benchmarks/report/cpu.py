"""The 35B on a CPU, as a part of the page."""

from et_moe.benchmarks.report.e2e import COLUMNS, cells, steps
from et_moe.benchmarks.report.markdown import source, table

HEAD = [
    "## On a CPU",
    "",
    "The CPU program runs the whole 35B, in 24 GB of memory. With random weights, made here:",
    "",
    "    scripts/cpu_full_size.sh FOLDER",
    "    python -m et_moe.benchmarks report FOLDER/results",
    "",
    "The demo model against Hugging Face's eager one, and the peak memory of quantizing and "
    "exporting:",
    "",
    "    scripts/demo.sh && python -m et_moe.benchmarks cpu",
    "    python -m et_moe.benchmarks memory --layers 4 FOLDER",
]


def section(result: dict | None) -> list[str]:
    """Markdown of a condensed result of the command `e2e` for a CPU program, if there is one."""
    if result is None:
        return [*HEAD, "", "**Not measured yet at a commit that this page knows.**"]
    columns = COLUMNS[2:8]
    rows = (cells(row)[2:8] for row in result["rows"])
    return [*HEAD, "", *source(result), *steps(result), *table(columns, rows, text_columns=0)]
