"""What `python -m et_moe.benchmarks static` found, as a part of the page."""

from et_moe.backends.cuda.gpu import ARCHS
from et_moe.benchmarks.report.markdown import source, table
from et_moe.benchmarks.static.summary import cells, summarize


def condense(result: dict) -> dict:
    """A row a kernel."""
    return {k: v for k, v in result.items() if k != "rows"} | {"kernels": summarize(result["rows"])}


def section(result: dict) -> list[str]:
    """Markdown of a condensed result."""
    count = sum(line["configurations"] for line in result["kernels"])
    spilled = [line["kernel"] for line in result["kernels"] if line["spilled_bytes"]]
    spills = f"Registers are spilled by {', '.join(spilled)}." if spilled else "None spills."
    return [
        "## Machine code of the kernels",
        "",
        *source(result),
        f"{count} kernels: every tuned configuration for every architecture. {spills} Cells are "
        "registers of a thread, KiB of shared memory and tensor-core instructions (MMA), from the "
        "least to the most of the configurations.",
        "",
        *table(("kernel", "configurations", *ARCHS), map(cells, result["kernels"])),
    ]
