"""Times an exported program through the runner: prefill, decode, time to first token, memory.

    python -m et_moe.benchmarks.e2e --program int8=DIR --program bf16=DIR --out benchmarks/e2e

A program is named after the dtype of its MoE activations; where its context does not hold prompt
and generated tokens (`et-moe export --max-seq-len 4608` does), fewer are generated, and the table
says how many. Each measured run is one of `--num_iters` iterations of `qwen3_5_moe_runner`, greedy,
on random prompt ids, with and without CUDA graphs. On a GPU, bytes and operations per second come
from the cost model (`roofline.py`) and the measured times, and are compared with the GPU's measured
roof; one prefill and one decoded token are profiled kernel by kernel. Works for a CPU program too,
without these. Writes `<out>.json`, `.md` and `.png`.
"""

import dataclasses
import json
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from et_moe.backends.atomic_file import write_file
from et_moe.benchmarks import roofline
from et_moe.benchmarks.e2e_report import COLUMNS, cells, plot, report
from et_moe.benchmarks.kernel_profile import DECODE_CALLS, profile
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.export import MAX_PREFILL_TOKENS
from et_moe.pipeline.models import load_config, parse_config

REPO = Path(__file__).resolve().parent.parent
ACTIVATIONS = ("int8", "bf16")


@dataclasses.dataclass(frozen=True)
class Program:
    """An exported program and the dtype of its MoE activations."""

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
    """The runner's binary and how often it repeats a measurement."""

    binary: Path
    warmup: int
    iterations: int
    vocabulary: int

    def command(
        self, program: Program, prompt: int, new_tokens: int, cuda_graph: bool
    ) -> list[str | Path]:
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
    """What the iterations of one measurement say.

    Time to first token is taken from the rate where it can be: the stats round times to whole
    milliseconds, rates not.
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
    """Kernels of one call of the model; without INT8 activations the INT8 products are bf16."""
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
    """Rates of a measured time, and its share of the roof: the least time over the time taken."""
    moved = sum(k.bytes for k in kernels) / seconds
    return {
        "bytes_per_s": moved,
        "operations_per_s": sum(k.int8 + k.bf16 for k in kernels) / seconds,
        "of_bandwidth": moved / roof["bandwidth"],
        "of_roof": sum(k.seconds(**roof) for k in kernels) / seconds,
    }


def against_roof(row: dict, c: ModelConfig, roof: dict) -> dict:
    """`achieved` of prefill and decode; decode at the middle of the context that it went over."""
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
    return {"name": torch.cuda.get_device_name(), "roof": roof, "torch": torch.__version__}


def measure_gpu() -> dict | None:
    """Name and roof of the GPU, or None; in a process that gives its memory back."""
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
):
    """Yields a row per program, prompt and use of CUDA graphs (which a CPU program has not)."""
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


def _save(result: dict, out: Path) -> None:
    write_file(out.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    write_file(out.with_suffix(".md"), report(result).encode())


def main(
    program: Annotated[list[str], typer.Option(help="int8=DIR or bf16=DIR; repeatable.")],
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path(
        "benchmarks/e2e"
    ),
    prompts: Annotated[str, typer.Option(help="Prompt lengths.")] = "128,512,1600,4096",
    new_tokens: Annotated[int, typer.Option(help="Tokens generated per run.", min=2)] = 512,
    warmup: Annotated[int, typer.Option(min=1)] = 2,
    num_iters: Annotated[int, typer.Option(min=1)] = 5,
    profile_prompt: Annotated[int, typer.Option(help="Prompt length of the profile.")] = 1600,
    model_dir: Annotated[
        Path | None, typer.Option(help="Folder of the model's config.json; default the 35B shape.")
    ] = None,
    runner: Annotated[Path, typer.Option(help="The runner's binary.")] = (
        REPO / "build/runner/qwen3_5_moe_runner"
    ),
) -> None:
    """Measures every program; exits with 1 if a measurement failed."""
    programs = [Program.parse(text) for text in program]
    c = load_config(model_dir) if model_dir else parse_config({"model_type": "qwen3_5_moe"})
    driver, gpu = Runner(runner, warmup, num_iters, c.vocab_size), measure_gpu()
    processor = platform.processor() or platform.machine()
    result = {
        "command": shlex.join(["python", "benchmarks/e2e.py", *sys.argv[1:]]),
        "machine": gpu["name"] if gpu else f"{processor}, {os.cpu_count()} cores",
        "gpu": gpu,
        "rows": [],
        "profiles": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    lengths = [int(m) for m in prompts.split(",")]
    for row in measure_all(driver, programs, lengths, new_tokens, c, gpu):
        result["rows"].append(row)
        print(" | ".join(cells(row)), flush=True)
        _save(result, out)
    for entry in programs:
        if any(r["activations"] == entry.activations and r.get("gpu") for r in result["rows"]):
            made = driver.profile(entry, profile_prompt)
            head = {"activations": entry.activations, "prompt": profile_prompt}
            result["profiles"].append(head | made)
            _save(result, out)
    table = Table(*COLUMNS)
    for row in result["rows"]:
        table.add_row(*cells(row))
    Console(width=170).print(table)
    plot(result, out.with_suffix(".png"))
    if any("error" in row for row in result["rows"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
