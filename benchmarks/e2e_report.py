"""What `bench_e2e.py` measured, as Markdown, table cells and a plot."""

from pathlib import Path

from et_moe.benchmarks.plotting import pyplot


def _number(value: dict | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    low, high = (f"{value[key]:.{digits}f}" for key in ("low", "high"))
    return f"{value['median']:.{digits}f} ({low} to {high})"


COLUMNS = ("program", "graphs", "prompt", "new", "prefill tok/s", "first token ms", "decode tok/s")
COLUMNS += ("load s", "GPU MiB", "prefill of roof", "decode GB/s", "decode of roof")


def cells(row: dict) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    graphs = "yes" if row["cuda_graph"] else "no"
    head = [row["activations"], graphs, str(row["prompt"])]
    if "error" in row:
        return [*head, f"failed: {row['error']}", *[""] * (len(COLUMNS) - 4)]
    reached = row["achieved"] or {"prefill": None, "decode": None}
    prefill, decode = reached["prefill"], reached["decode"]
    return [
        *head,
        str(row["generated"]),
        _number(row["prefill_tok_s"]),
        _number(row["first_token_ms"], 1),
        _number(row["decode_tok_s"], 1),
        f"{row['load_ms'] / 1e3:.2f}",
        f"{row['gpu']['used_mb']:.0f}" if row["gpu"] else "-",
        f"{prefill['of_roof']:.0%}" if prefill else "-",
        f"{decode['bytes_per_s'] / 1e9:.0f}" if decode else "-",
        f"{decode['of_roof']:.0%}" if decode else "-",
    ]


def profile_text(entry: dict, count: int = 20) -> list[str]:
    """Markdown of a profile."""
    lines = ["", f"## Kernels, {entry['activations']}, prompt of {entry['prompt']} tokens"]
    if "error" in entry:
        return [*lines, "", f"Not profiled: {entry['error']}"]
    for call in ("decode", "prefill"):
        made = entry[call]
        lines += ["", f"### {call}: {made['launches']} launches, {made['kernels_us']:.0f} us", ""]
        lines += ["| kernel | launches | us | share |", "|---|--:|--:|--:|"]
        lines += [
            f"| {k['name']} | {k['launches']} | {k['us']:.1f} | {k['share']:.1%} |"
            for k in made["kernels"][:count]
        ]
    return lines


def report(result: dict) -> str:
    """Markdown."""
    gpu, lines = (
        result["gpu"],
        [f"# End to end on {result['machine']}", "", f"`{result['command']}`", ""],
    )
    if gpu:
        roof = gpu["roof"]
        lines += [
            f"Measured roof: {roof['bandwidth'] / 1e12:.2f} TB/s, {roof['int8'] / 1e12:.0f} TOPS "
            f"INT8, {roof['bf16'] / 1e12:.0f} TFLOPS bf16.",
            "",
        ]
    lines += ["Medians, with lowest and highest of the iterations in parentheses.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]
    for entry in result["profiles"]:
        lines += profile_text(entry)
    return "\n".join(lines) + "\n"


def plot(result: dict, path: Path) -> None:
    """Tokens per second over the context."""
    plt = pyplot()
    if plt is None:
        return
    rows = [row for row in result["rows"] if "error" not in row]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    for panel, name in zip(panels, ("decode", "prefill"), strict=True):
        for key in dict.fromkeys((r["activations"], r["cuda_graph"]) for r in rows):
            line = [
                (r["prompt"], r[f"{name}_tok_s"])
                for r in rows
                if (r["activations"], r["cuda_graph"]) == key and r[f"{name}_tok_s"]
            ]
            x, y = [p for p, _ in line], [v["median"] for _, v in line]
            error = [[v["median"] - v["low"], v["high"] - v["median"]] for _, v in line]
            label = f"{key[0]} activations" + (", CUDA graphs" if key[1] else "")
            sides = list(zip(*error, strict=True)) if error else None
            panel.errorbar(x, y, yerr=sides, marker="o", capsize=3, label=label)
        panel.set(title=name, xscale="log", xlabel="prompt, tokens", ylabel="tokens/s")
        panel.set_xticks([r["prompt"] for r in rows], [str(r["prompt"]) for r in rows])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    figure.suptitle(result["machine"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
