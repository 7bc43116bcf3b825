"""Runs other implementations of the model at the same shape on the same GPU, and prints our ratio.

    python -m et_moe.benchmarks.e2e --program int8=DIR --out benchmarks/e2e
    python -m et_moe.benchmarks.peers --e2e benchmarks/e2e.json --out benchmarks/peers

Peers are the ExecuTorch wheel's own modules (`peer_executorch.py`) and, with `--llama-bench` and
`--gguf`, llama.cpp (`peer_llama_cpp.py` says how it is built; a GGUF that does not exist is
written, 20 GB of random weights). Of each side the fastest variant counts. The results of
`bench_e2e.py` must come from the same GPU. Writes `<out>.json` and `.md`.
"""

import json
import multiprocessing
import queue
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from et_moe.backends.atomic_file import write_file
from et_moe.benchmarks import peer_executorch, peer_llama_cpp
from et_moe.benchmarks.gpu_timing import require_gpu
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.models import load_config, parse_config

PHASES = ("prefill", "decode")
COLUMNS = ("phase", "prompt", "peer", "its fastest", "tok/s", "ours", "tok/s", "ratio")


def our_fastest(e2e: dict, phase: str, prompt: int) -> dict | None:
    """The row of `bench_e2e.py` with the highest median of a phase."""
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


def report(result: dict) -> str:
    """Markdown."""
    lines = [f"# Against peers on {result['gpu']}", "", f"`{result['command']}`", ""]
    lines += [
        "Ours are medians of the runner end to end (sampling and host included); a peer's are"
    ]
    lines += ["medians of its fastest variant.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---|--:|---|---|--:|---|--:|--:|"]
    lines += ["| " + " | ".join(cells(line)) + " |" for line in result["comparison"]]
    failed = [row for row in result["rows"] if "error" in row]
    lines += [""] * bool(failed)
    lines += [
        f"Failed: {r['peer']}, {r['phase']}, {r['variant']}, {r.get('prompt', 'all prompts')}: "
        f"{r['error']}"
        for r in failed
    ]
    return "\n".join(lines) + "\n"


def _send_rows(rows: multiprocessing.Queue, *arguments) -> None:
    for row in peer_executorch.measure(*arguments):
        rows.put(row)


def executorch_rows(c: ModelConfig, prompts: list[int], new_tokens: int) -> Iterator[dict]:
    """Rows of the wheel, measured in a process of its own: a crash there loses no row, and its
    memory is free for the next peer."""
    context = multiprocessing.get_context("spawn")
    rows = context.Queue()
    process = context.Process(target=_send_rows, args=(rows, c, prompts, new_tokens))
    process.start()
    while True:
        try:
            yield rows.get(timeout=1)
        except queue.Empty:
            if not process.is_alive() and rows.empty():
                break
    process.join()
    if process.exitcode:
        head = {"peer": "ExecuTorch", "phase": "any", "variant": "any"}
        yield head | {"error": f"ended with exit code {process.exitcode}, see its output"}


def main(
    e2e: Annotated[Path, typer.Option(help="JSON of bench_e2e.py, from this GPU.")],
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/peers"
    ),
    prompts: Annotated[str, typer.Option(help="Prompt lengths.")] = "1600",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after a prompt.")] = 512,
    model_dir: Annotated[
        Path | None, typer.Option(help="Folder of the model's config.json; default the 35B shape.")
    ] = None,
    llama_bench: Annotated[Path | None, typer.Option(help="llama.cpp's benchmark binary.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="Its model; written if need be.")] = None,
) -> None:
    """Measures the peers; exits with 1 if one of them failed."""
    require_gpu()
    if (llama_bench is None) != (gguf is None):
        raise typer.BadParameter("--llama-bench and --gguf go together")
    measured, gpu = json.loads(e2e.read_text()), torch.cuda.get_device_name()
    if measured["machine"] != gpu:
        raise typer.BadParameter(f"{e2e} is from {measured['machine']}, this GPU is {gpu}")
    c = load_config(model_dir) if model_dir else parse_config({"model_type": "qwen3_5_moe"})
    lengths = [int(m) for m in prompts.split(",")]
    result: dict = {
        "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "gpu": gpu,
        "torch": torch.__version__,
        "rows": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)

    def take(rows: Iterator[dict]) -> None:
        for row in rows:
            print(row, flush=True)
            result["rows"].append(row)
            result["comparison"] = compare(result["rows"], measured)
            write_file(out.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
            write_file(out.with_suffix(".md"), report(result).encode())

    take(executorch_rows(c, lengths, new_tokens))
    if llama_bench:
        if not gguf.exists():
            peer_llama_cpp.write_gguf(gguf, c)
        take(peer_llama_cpp.run_bench(llama_bench, gguf, lengths, new_tokens))
    table = Table(*COLUMNS)
    for line in result.get("comparison", []):
        table.add_row(*cells(line))
    Console(width=140).print(table)
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
