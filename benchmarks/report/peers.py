"""Other implementations against ours: the comparison, and its part of the page."""

from et_moe.benchmarks.report.markdown import source, table

PHASES = ("prefill", "decode")
COLUMNS = ("phase", "prompt", "peer", "its fastest", "tok/s", "ours", "tok/s", "ratio")


def our_fastest(e2e: dict, phase: str, prompt: int) -> dict | None:
    """The row of a result of `e2e` with the highest median of a phase."""
    rows = [
        row
        for row in e2e["rows"]
        if row["prompt"] == prompt and "error" not in row and row[f"{phase}_tok_s"]
    ]
    return max(rows, key=lambda row: row[f"{phase}_tok_s"]["median"], default=None)


def compare(rows: list[dict], e2e: dict) -> list[dict]:
    """A line per phase, prompt and peer: its fastest variant against our fastest."""
    lines = []
    timed = [row for row in rows if "tok_s" in row]
    for phase in PHASES:
        keys = dict.fromkeys((r["prompt"], r["peer"]) for r in timed if r["phase"] == phase)
        for prompt, peer in sorted(keys):
            candidates = [
                r for r in timed if (r["phase"], r["prompt"], r["peer"]) == (phase, prompt, peer)
            ]
            best, ours = max(candidates, key=lambda r: r["tok_s"]), our_fastest(e2e, phase, prompt)
            line = {"phase": phase, "prompt": prompt, "peer": peer, "peer_tok_s": best["tok_s"]}
            line |= {"peer_variant": best["variant"], "ours": None, "ours_tok_s": None}
            line["ratio"] = None
            if ours:
                rate = ours[f"{phase}_tok_s"]["median"]
                graphs = ", CUDA graphs" if ours["cuda_graph"] else ""
                line |= {"ours": f"{ours['activations']} activations{graphs}", "ours_tok_s": rate}
                line["ratio"] = rate / best["tok_s"]
            lines.append(line)
    return lines


def cells(line: dict) -> list[str]:
    """A line of `compare` as text, in the order of `COLUMNS`."""
    head = [line["phase"], str(line["prompt"]), line["peer"], line["peer_variant"]]
    if line["ours"] is None:
        return [*head, f"{line['peer_tok_s']:.1f}", "not measured", "-", "-"]
    ours = [line["ours"], f"{line['ours_tok_s']:.1f}", f"{line['ratio']:.2f}"]
    return [*head, f"{line['peer_tok_s']:.1f}", *ours]


def section(result: dict) -> list[str]:
    """Markdown of a result of the command `peers`."""
    failed = [
        f"Failed: {r['peer']}, {r['phase']}, {r['variant']}, {r.get('prompt', 'all prompts')}: "
        f"{r['error']}"
        for r in result["rows"]
        if "error" in r
    ]
    return [
        "## Other implementations",
        "",
        *source(result),
        "The same shape with random weights, on the same GPU. ExecuTorch's are the wheel's own "
        "modules and kernels, called from Python in CUDA graphs; llama.cpp's is `llama-bench` on a "
        "random Q4_0 file. Of each the fastest variant counts, at the median. Ours are medians of "
        "the runner in the same run, with sampling and the host.",
        "",
        *table(COLUMNS, map(cells, result["comparison"]), text_columns=4),
        *(line for text in failed for line in ("", text)),
    ]
