"""Decode speed of an exported model through the runner against Hugging Face eager.

Both run greedily on this machine, one after the other.
"""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM

from et_moe.benchmarks.result import RUNNER


def runner_rates(program: Path, prompt: list[int], tokens: int, iterations: int) -> list[float]:
    """Decoded tokens per second of each measured run."""
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder, "stats.json")
        subprocess.run(
            [
                RUNNER,
                f"--model_path={program / 'model.pte'}",
                f"--data_path={program / 'model.ptd'}",
                f"--prompt_ids={','.join(map(str, prompt))}",
                f"--max_new_tokens={tokens}",
                "--warmup=1",
                f"--num_iters={iterations}",
                f"--stats_path={stats}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = stats.read_text().splitlines()
        return [json.loads(line)["decode_token_per_sec"] for line in lines]


def eager_rates(model, prompt: list[int], tokens: int, iterations: int) -> list[float]:
    """The same for Hugging Face: the time of the first token, prefill included, is subtracted."""
    ids = torch.tensor([prompt])

    def generate(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
        )
        return time.perf_counter() - start

    generate(2)
    return [(tokens - 1) / (generate(tokens) - generate(1)) for _ in range(iterations)]


def measure(model_dir: Path, program_dir: Path, tokens: int, iterations: int) -> None:
    """Prints tokens per second of both (median, lowest, highest) and the ratio.

    Args:
        model_dir: the checkpoint.
        program_dir: its program for the CPU.
        tokens: how many are generated in a run.
        iterations: how often each of the two is run.
    """
    if not (program_dir / "model.pte").is_file():
        raise typer.BadParameter(
            f"{program_dir / 'model.pte'} is missing; scripts/demo.sh makes it"
        )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    prompt = list(range(10, 42))
    with torch.no_grad():
        eager = eager_rates(model, prompt, tokens, iterations)
    ours = runner_rates(program_dir, prompt, tokens, iterations)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, decode, tokens/s")
    for name, rates in (("Hugging Face eager", eager), ("runner", ours)):
        low, high = min(rates), max(rates)
        print(f"  {name:<20} {statistics.median(rates):8.1f}  ({low:.1f} to {high:.1f})")
    print(f"  ratio                {statistics.median(ours) / statistics.median(eager):8.1f}")
