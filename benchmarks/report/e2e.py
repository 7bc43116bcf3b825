"""The runner's end-to-end results: cells of a table, and their part of the page."""

from pathlib import Path

from et_moe.benchmarks.report.markdown import number, source, table
from et_moe.benchmarks.report.plots import drawing

HEADLINE_PROMPT = 1600
"""Length of the prompt that the first figures of the page are of."""
KERNELS = 14
"""Kernels of a profile that are listed, the slowest first."""
COLUMNS = ("program", "graphs", "prompt", "new", "prefill tok/s", "first token ms", "decode tok/s")
COLUMNS += ("load s", "GPU MiB", "prefill of roof", "decode GB/s", "decode of roof")


def _spread(value: dict | None, digits: int = 0) -> str:
    if value is None:
        return "-"
    low, high = (f"{value[key]:.{digits}f}" for key in ("low", "high"))
    return f"{value['median']:.{digits}f} ({low} to {high})"


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
        _spread(row["prefill_tok_s"]),
        _spread(row["first_token_ms"], 1),
        _spread(row["decode_tok_s"], 1),
        f"{row['load_ms'] / 1e3:.2f}",
        f"{row['gpu']['used_mb']:.0f}" if row["gpu"] else "-",
        f"{prefill['of_roof']:.0%}" if prefill else "-",
        f"{decode['bytes_per_s'] / 1e9:.0f}" if decode else "-",
        f"{decode['of_roof']:.0%}" if decode else "-",
    ]


def condense(result: dict) -> dict:
    """What the page needs of a result of the command `e2e`: profiles become a row a kernel."""
    calls, kernels = [], []
    for profile in result["profiles"]:
        head = {key: profile[key] for key in ("activations", "prompt")}
        if "error" in profile:
            calls.append(head | {"error": profile["error"]})
            continue
        for name in ("decode", "prefill"):
            call = profile[name]
            figures = {key: call[key] for key in ("launches", "kernels_us", "span_us")}
            calls.append(head | {"call": name} | figures)
            kernels += [head | {"call": name} | kernel for kernel in call["kernels"][:KERNELS]]
    kept = {key: value for key, value in result.items() if key != "profiles"}
    return kept | {"calls": calls, "kernels": kernels}


def _headline(rows: list[dict]) -> list[str]:
    """The figures of one prompt with CUDA graphs."""
    chosen = [r for r in rows if r["prompt"] == HEADLINE_PROMPT and r["cuda_graph"]]
    chosen = [r for r in chosen if "error" not in r and r["decode_tok_s"]]
    if not chosen:
        return []
    head = ("activations", "prefill tok/s", "first token ms", "decode tok/s", "load s", "GPU GiB")
    lines = [
        [
            row["activations"],
            number(row["prefill_tok_s"]["median"]),
            number(row["first_token_ms"]["median"], 1),
            number(row["decode_tok_s"]["median"]),
            number(row["load_ms"] / 1e3, 1),
            number(row["gpu"]["used_mb"] / 1024, 1) if row["gpu"] else "-",
        ]
        for row in chosen
    ]
    new = chosen[0]["generated"]
    text = f"A prompt of {HEADLINE_PROMPT} tokens and {new} generated, with CUDA graphs:"
    return [text, "", *table(head, lines), ""]


def steps(result: dict) -> list[str]:
    """How long the commands in front of the benchmark took, where that is known."""
    made = [[f"`{step['command']}`", str(step["seconds"])] for step in result.get("steps", ())]
    return [*table(("made by", "seconds"), made), ""] if made else []


def _profiles(result: dict) -> list[str]:
    """What a prefill and a decoded token consist of."""
    lines = []
    for call in result["calls"]:
        title = f"{call['activations']}, prompt of {call['prompt']} tokens"
        if "error" in call:
            lines += ["", f"Not profiled: {title}: {call['error']}"]
            continue
        mine = [
            kernel
            for kernel in result["kernels"]
            if all(kernel[key] == call[key] for key in ("activations", "prompt", "call"))
        ]
        lines += ["", f"### Kernels of {call['call']}: {title}", ""]
        lines += [f"{call['launches']} launches, {call['kernels_us']:,.0f} us; the slowest:", ""]
        lines += table(
            ("kernel", "launches", "us", "share"),
            [
                [f"`{k['name']}`", str(k["launches"]), f"{k['us']:.1f}", f"{k['share']:.1%}"]
                for k in mine
            ],
        )
    return lines


def section(result: dict) -> list[str]:
    """Markdown of a condensed result."""
    lines = ["## End to end", "", *source(result), *_headline(result["rows"]), *steps(result)]
    if result["gpu"]:
        roof = result["gpu"]["roof"]
        lines += [
            f"Measured roof: {roof['bandwidth'] / 1e12:.2f} TB/s, {roof['int8'] / 1e12:.0f} TOPS "
            f"INT8, {roof['bf16'] / 1e12:.0f} TFLOPS bf16."
        ]
    lines += [
        "Medians, with the lowest and the highest of the iterations in parentheses. A share of the "
        "roof is the least time that bytes and operations allow, over the time taken.",
        "",
        *table(COLUMNS, map(cells, result["rows"]), text_columns=2),
        "",
        "![tokens per second over the length of the prompt](images/e2e.png)",
        *_profiles(result),
    ]
    return lines


def plot(result: dict, path: Path) -> None:
    """Tokens per second over the length of the prompt."""
    rows = [row for row in result["rows"] if "error" not in row]
    with drawing(path, 1, 2, figsize=(11, 4.5)) as (figure, panels):
        for panel, name in zip(panels.flat, ("decode", "prefill"), strict=True):
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
