"""Times exported programs through the runner: prefill, decode, time to first token, memory.

A program is named after the dtype of its activations. Each run of `qwen3_5_moe_runner` is greedy,
on random prompt ids; a CUDA program is run with and without CUDA graphs. Where the program's
context does not hold the prompt and all new tokens (`et-moe export --max-seq-len 4608` makes one
that does), fewer tokens are generated, and the result says how many. On a GPU the measured times
are compared with the least that the cost model (`roofline.py`) and the GPU's measured roof allow,
and one prefill and one decoded token are profiled kernel by kernel.
"""

import dataclasses
import json
import multiprocessing
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from et_moe.benchmarks import roofline
from et_moe.benchmarks.profile import DECODE_CALLS, profile
from et_moe.benchmarks.report.e2e import COLUMNS, cells
from et_moe.benchmarks.result import provenance, write_result
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.export import MAX_PREFILL_TOKENS

ACTIVATIONS = ("int8", "bf16")


@dataclasses.dataclass(frozen=True)
class Program:
    """An exported program and the dtype of its activations."""

    activations: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> "Program":
        activations, _, folder = text.partition("=")
        if activations not in ACTIVATIONS or not (Path(folder) / "model.pte").is_file():
            raise typer.BadParameter(
                f"--program {text}: expected int8=DIR or bf16=DIR with a model.pte in DIR"
            )
        return cls(activations, Path(folder))


@dataclasses.dataclass(frozen=True)
class Runner:
    """The runner's binary and how often it repeats a measurement.

    Attributes:
        warmup: number of runs before those that count.
        iterations: number of runs that count.
        vocabulary: size of the vocabulary that prompt ids are drawn from.
    """

    binary: Path
    warmup: int
    iterations: int
    vocabulary: int

    def command(
        self, program: Program, prompt: int, new_tokens: int, cuda_graph: bool
    ) -> list[str | Path]:
        """A command line with a random prompt of some length, the same each time."""
        ids = random.Random(prompt).choices(range(self.vocabulary), k=prompt)
        return [
            self.binary,
            f"--model_path={program.folder / 'model.pte'}",
            f"--data_path={program.folder / 'model.ptd'}",
            f"--prompt_ids={','.join(map(str, ids))}",
            f"--max_new_tokens={new_tokens}",
            f"--warmup={self.warmup}",
            *(["--cuda_graph"] if cuda_graph else []),
        ]

    def measure(
        self, program: Program, prompt: int, new_tokens: int, cuda_graph: bool
    ) -> list[dict]:
        """The stats of each iteration.

        Raises:
            RuntimeError: the runner fails; with its message.
        """
        with tempfile.TemporaryDirectory() as folder:
            stats = Path(folder, "stats.json")
            command = self.command(program, prompt, new_tokens, cuda_graph)
            command += [f"--num_iters={self.iterations}", f"--stats_path={stats}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-500:] or f"exit code {done.returncode}")
            return [json.loads(line) for line in stats.read_text().splitlines()]

    def profile(self, program: Program, prompt: int) -> dict:
        """Kernels of a prefill and of a decoded token, replayed as CUDA graphs."""
        with tempfile.TemporaryDirectory() as folder:
            command = self.command(program, prompt, DECODE_CALLS + 1, cuda_graph=True)
            return profile([*command, "--num_iters=2"], Path(folder))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(stats: list[dict]) -> dict:
    """The result's row of one measurement, made of the runner's stats of each iteration.

    The time to the first token is computed from the prefill's rate, since the stats round times to
    whole milliseconds, but not rates.
    """
    first = stats[0]
    if any(s["prefill_token_per_sec"] <= 0 for s in stats):
        raise RuntimeError("a prefill took no measurable time")
    decode = [s["decode_token_per_sec"] for s in stats if s["decode_token_per_sec"] > 0]
    to_first = [
        1e3 * s["prompt_tokens"] / s["prefill_token_per_sec"]
        + s["first_token_ms"]
        - s["prompt_eval_end_ms"]
        for s in stats
    ]
    row = {
        "generated": min(s["generated_tokens"] for s in stats),
        "prefill_tok_s": spread([s["prefill_token_per_sec"] for s in stats]),
        "decode_tok_s": spread(decode) if decode else None,
        "first_token_ms": spread(to_first),
        "load_ms": first["model_load_end_ms"] - first["model_load_start_ms"],
        "gpu": None,
    }
    if "gpu_total_bytes" in first:
        free = min(
            s[f"gpu_free_{when}_bytes"] for s in stats for when in ("after_load", "after_generate")
        )
        row["gpu"] = {
            "peak_mb": max(s["gpu_peak_usage_mb"] for s in stats),
            "used_mb": (first["gpu_free_before_load_bytes"] - free) / 2**20,
        }
    return row


def call_cost(c: ModelConfig, activations: str, tokens: int, context: int) -> list[roofline.Kernel]:
    """Kernels of one call of the model; with bf16 activations all products are of bf16 operands."""
    kernels = roofline.model(tokens, c, context)
    if activations == "int8":
        return kernels
    return [dataclasses.replace(k, int8=0.0, bf16=k.int8 + k.bf16) for k in kernels]


def prefill_cost(c: ModelConfig, activations: str, prompt: int) -> list[roofline.Kernel]:
    """Kernels of a prompt, which the runner feeds in pieces."""
    pieces = range(0, prompt, MAX_PREFILL_TOKENS)
    calls = [
        call_cost(c, activations, min(MAX_PREFILL_TOKENS, prompt - begin), begin)
        for begin in pieces
    ]
    return [kernel for call in calls for kernel in call]


def achieved(kernels: list[roofline.Kernel], seconds: float, roof: dict) -> dict[str, float]:
    """Bytes and operations per second in a measured time, and how much of the roof that is.

    The share of the roof is the least time that bytes and operations allow, over the time taken.
    """
    moved = sum(k.bytes for k in kernels) / seconds
    return {
        "bytes_per_s": moved,
        "operations_per_s": sum(k.int8 + k.bf16 for k in kernels) / seconds,
        "of_bandwidth": moved / roof["bandwidth"],
        "of_roof": sum(k.seconds(**roof) for k in kernels) / seconds,
    }


def against_roof(row: dict, c: ModelConfig, roof: dict) -> dict:
    """What `achieved` says of a row's prefill and decode.

    Decode is counted at the middle of the range of contexts that its tokens were generated at.
    """
    name, prompt = row["activations"], row["prompt"]
    seconds = prompt / row["prefill_tok_s"]["median"]
    result = {"prefill": achieved(prefill_cost(c, name, prompt), seconds, roof), "decode": None}
    if row["decode_tok_s"]:
        kernels = call_cost(c, name, 1, prompt + row["generated"] // 2)
        result["decode"] = achieved(kernels, 1 / row["decode_tok_s"]["median"], roof)
    return result


def _gpu() -> dict:
    from et_moe.benchmarks.kernels import measure_roof

    roof = measure_roof(torch.device("cuda"))
    return {"name": torch.cuda.get_device_name(), "roof": roof}


def measure_gpu() -> dict | None:
    """Name and roof of the GPU, or None without one.

    They are measured in a process of their own, which gives the GPU's memory back when it ends.
    """
    if not torch.cuda.is_available():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_gpu).result()


def measure_all(
    runner: Runner,
    programs: list[Program],
    prompts: list[int],
    new_tokens: int,
    c: ModelConfig,
    gpu: dict | None,
) -> Iterator[dict]:
    """Yields a row for each program and prompt, without and (on a GPU) with CUDA graphs."""
    for program in programs:
        on_gpu = True
        for prompt in prompts:
            for cuda_graph in (False, True):
                if cuda_graph and not on_gpu:
                    continue
                row = {"activations": program.activations, "cuda_graph": cuda_graph}
                row |= {"prompt": prompt, "requested": new_tokens}
                try:
                    row |= summarize(runner.measure(program, prompt, new_tokens, cuda_graph))
                except RuntimeError as e:  # one failure must not end the benchmark
                    yield row | {"error": str(e)}
                    continue
                on_gpu = row["gpu"] is not None
                row["achieved"] = against_roof(row, c, gpu["roof"]) if gpu and on_gpu else None
                yield row


def measure(
    runner: Runner,
    programs: list[Program],
    prompts: list[int],
    new_tokens: int,
    profile_prompt: int,
    c: ModelConfig,
    out: Path,
) -> bool:
    """Measures every program, and writes `out` after each row.

    Args:
        prompts: lengths of the prompts.
        new_tokens: how many tokens are generated after each.
        profile_prompt: length of the prompt that is profiled on a GPU.
        c: the shape of the programs' model.

    Returns:
        Whether no measurement failed.
    """
    gpu = measure_gpu()
    result: dict = provenance() | {"gpu": gpu, "rows": [], "profiles": []}
    for row in measure_all(runner, programs, prompts, new_tokens, c, gpu):
        result["rows"].append(row)
        print(" | ".join(cells(row)), flush=True)
        write_result(out, result)
    for entry in programs:
        if any(r["activations"] == entry.activations and r.get("gpu") for r in result["rows"]):
            head = {"activations": entry.activations, "prompt": profile_prompt}
            result["profiles"].append(head | runner.profile(entry, profile_prompt))
            write_result(out, result)
    table = Table(*COLUMNS)
    for row in result["rows"]:
        table.add_row(*cells(row))
    Console(width=170).print(table)
    return not any("error" in row for row in result["rows"])
