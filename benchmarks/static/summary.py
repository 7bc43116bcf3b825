"""A line a kernel: the span over its configurations, for each architecture."""

from et_moe.backends.cuda.gpu import ARCHS

SPANS = ("registers", "shared_memory", "tensor_instructions")


def summarize(rows: list[dict]) -> list[dict]:
    """One line for each kernel, over all of its configurations.

    Returns:
        Lines with "kernel", "configurations" (their number, of all architectures together),
        "spilled_bytes" (the most of any of them) and, for each architecture, the least and the most
        of each of `SPANS`.
    """
    lines = []
    for kernel in sorted({row["kernel"] for row in rows}):
        mine = [row for row in rows if row["kernel"] == kernel and "error" not in row]
        line: dict = {"kernel": kernel, "configurations": len(mine)}
        line["spilled_bytes"] = max((row["spilled_bytes"] for row in mine), default=0)
        for arch in ARCHS:
            here = [row for row in mine if row["arch"] == arch]
            if here:
                values = [[row[key] for row in here] for key in SPANS]
                line[arch] = [[min(found), max(found)] for found in values]
        lines.append(line)
    return lines


def _span(low: int, high: int, unit: int = 1) -> str:
    low, high = -(-low // unit), -(-high // unit)
    return str(high) if low == high else f"{low}-{high}"


def cells(line: dict) -> list[str]:
    """A line of `summarize` as text: name, number of configurations, and a cell an architecture."""
    found = [line["kernel"], str(line["configurations"])]
    for arch in ARCHS:
        if arch in line:
            registers, shared, tensor = line[arch]
            text = f"{_span(*registers)}, {_span(*shared, unit=1024)}, {_span(*tensor)}"
            found.append(text)
        else:
            found.append("")
    return found
