"""Runs other implementations of the model at the same shape on the same GPU.

They are the ExecuTorch wheel's own modules (`executorch.py`) and llama.cpp (`llama_cpp.py` says how
it is built). Of each side the fastest variant counts.
"""

import json
import multiprocessing
import queue
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from et_moe.benchmarks.peers import executorch, llama_cpp
from et_moe.benchmarks.report.peers import COLUMNS, cells, compare
from et_moe.benchmarks.result import provenance, write_result
from et_moe.benchmarks.timing import require_gpu
from et_moe.examples.qwen3_5_moe.config import ModelConfig


def _send_rows(rows: multiprocessing.Queue, *arguments) -> None:
    for row in executorch.measure(*arguments):
        rows.put(row)


def executorch_rows(c: ModelConfig, prompts: list[int], new_tokens: int) -> Iterator[dict]:
    """Yields the rows of the wheel, which is measured in a process of its own.

    So a crash there loses no row, and the GPU's memory is free for the next peer.
    """
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


def measure(
    e2e: Path,
    prompts: list[int],
    new_tokens: int,
    c: ModelConfig,
    llama: tuple[Path, Path] | None,
    out: Path,
) -> bool:
    """Measures the peers, and writes `out` after each row.

    Args:
        e2e: result of the command `e2e`, from this GPU.
        prompts: lengths of the prompts.
        new_tokens: how many tokens are decoded after each.
        c: the shape of the model.
        llama: llama.cpp's `llama-bench` and its model, which is written if it does not exist (20 GB
            of random weights), or None.

    Returns:
        Whether none of them failed.
    """
    require_gpu()
    measured, head = json.loads(e2e.read_text()), provenance()
    if measured["machine"] != head["machine"]:
        raise typer.BadParameter(
            f"{e2e} is from {measured['machine']}, this GPU is {head['machine']}"
        )
    result: dict = head | {"rows": [], "comparison": []}

    def take(rows: Iterator[dict]) -> None:
        for row in rows:
            print(row, flush=True)
            result["rows"].append(row)
            result["comparison"] = compare(result["rows"], measured)
            write_result(out, result)

    take(executorch_rows(c, prompts, new_tokens))
    if llama:
        binary, gguf = llama
        if not gguf.exists():
            llama_cpp.write_gguf(gguf, c)
        take(llama_cpp.run_bench(binary, gguf, prompts, new_tokens))
    table = Table(*COLUMNS)
    for line in result["comparison"]:
        table.add_row(*cells(line))
    Console(width=140).print(table)
    return not any("error" in row for row in result["rows"])
