"""Times many sequences at once, through the runner's `--prompts_path`.

All prompts are random, of one length, and in flight at once. Output tokens a second count from the
start to the last token of the last answer; decoded tokens a second from the moment on at which all
sequences decode. That rate is compared with the roof of a step
(`roofline.batch_step`) at the middle of the contexts.
"""

import json
import random
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from et_moe.benchmarks import roofline
from et_moe.benchmarks.e2e import measure_gpu
from et_moe.benchmarks.report.batch import COLUMNS, cells
from et_moe.benchmarks.result import provenance, write_result
from et_moe.examples.qwen3_5_moe.config import ModelConfig

_RATES = ("output_token_per_sec", "decode_token_per_sec", "prefill_token_per_sec")
_TIMES = tuple(
    f"{name}_ms_{part}"
    for name in ("time_to_first_token", "time_between_tokens")
    for part in ("median", "p99")
)


def _run(
    runner: Path, program: Path, sequences: int, prompt: int, new_tokens: int, vocabulary: int
) -> dict:
    """The runner's stats of the second of two runs.

    Raises:
        RuntimeError: the runner fails; with its message.
    """
    draw = random.Random(prompt)
    with tempfile.TemporaryDirectory() as folder:
        prompts, ids, stats = (Path(folder, name) for name in ("prompts", "ids", "stats"))
        with prompts.open("w") as file:
            for _ in range(sequences):
                line = {"prompt_ids": draw.choices(range(vocabulary), k=prompt)}
                file.write(json.dumps(line) + "\n")
        command = [
            *(runner, f"--model_path={program / 'model.pte'}"),
            f"--data_path={program / 'model.ptd'}",
            *(f"--prompts_path={prompts}", f"--max_sequences={sequences}", "--cuda_graph"),
            *(f"--max_new_tokens={new_tokens}", "--num_iters=2"),
            *(f"--output_ids_path={ids}", f"--stats_path={stats}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-500:] or f"exit code {done.returncode}")
        return json.loads(stats.read_text().splitlines()[-1])


def measure(
    runner: Path,
    program: Path,
    counts: list[int],
    prompt: int,
    new_tokens: int,
    c: ModelConfig,
    out: Path,
) -> bool:
    """Measures each number of sequences, and writes `out` after each.

    Returns:
        Whether no measurement failed.
    """
    gpu = measure_gpu()
    head = {"gpu": gpu, "prompt": prompt, "new_tokens": new_tokens}
    result: dict = provenance() | head | {"rows": []}
    table = Table(*COLUMNS)
    for count in counts:
        row: dict = {"sequences": count}
        result["rows"].append(row)
        try:
            stats = _run(runner, program, count, prompt, new_tokens, c.vocab_size)
        except RuntimeError as e:  # one failure must not end the benchmark
            row["error"] = str(e)
            table.add_row(*cells(row))
        else:
            row |= {name: stats[name] for name in (*_RATES, *_TIMES)}
            if gpu:
                step = roofline.batch_step(count, c, prompt + new_tokens // 2)
                least = sum(kernel.seconds(**gpu["roof"]) for kernel in step)
                row["of_roof"] = least * row["decode_token_per_sec"] / count
            table.add_row(*cells(row))
        print(row, flush=True)
        write_result(out, result)
    Console(width=170).print(table)
    return not any("error" in row for row in result["rows"])
