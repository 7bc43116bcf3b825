"""Times many sequences at once, through the runner's `--prompts_path`.

All prompts are random, of one length, and submitted at once. Output tokens a second count from the
start to the last token of the last answer. A step is the median time between two tokens of a
sequence, while nearly all of the time all sequences decode; it is compared with its roof
(`roofline.batch_step`) at the middle of the contexts.

Of a program with drafts (`et-moe export --draft-tokens`) rows say how many were fed and accepted.
Of random weights few are, so what drafts cost is the time of a step, `step_ms`: in one a sequence
draws a token, and one more for each draft that is accepted.
"""

import dataclasses
import json
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from et_moe.benchmarks import roofline
from et_moe.benchmarks.e2e import measure_gpu
from et_moe.benchmarks.profile import profile_batch
from et_moe.benchmarks.report.batch import COLUMNS, cells
from et_moe.benchmarks.result import provenance, write_result
from et_moe.examples.qwen3_5_moe.config import ModelConfig

_RATES = ("output_token_per_sec", "decode_token_per_sec", "prefill_token_per_sec")
_DRAFTS = ("draft_tokens", "accepted_draft_tokens", "accepted_draft_tokens_per_position")
_TIMES = tuple(
    f"{name}_ms_{part}"
    for name in ("time_to_first_token", "time_between_tokens")
    for part in ("median", "p99")
)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of the runner.

    Attributes:
        sequences: the most that are decoded at once.
        requests: prompts, all submitted at once; where they are more than the sequences, they ask
            for half to one and a half times the tokens, so that places come free one by one.
        prompt, new_tokens: tokens of each prompt, and after it.
    """

    sequences: int
    requests: int
    prompt: int
    new_tokens: int

    @staticmethod
    def parse(text: str) -> "Load":
        """SEQUENCES:PROMPT:NEW_TOKENS[:REQUESTS]; without the last as many as sequences.

        Raises:
            ValueError: it is something else.
        """
        parts = text.split(":")
        if not (3 <= len(parts) <= 4 and all(p.isdecimal() and int(p) > 0 for p in parts)):
            raise ValueError(
                f"--load {text}: expected SEQUENCES:PROMPT:NEW_TOKENS[:REQUESTS], as 8:1700:600"
            )
        sequences, prompt, new_tokens, *requests = map(int, parts)
        return Load(sequences, *(requests or [sequences]), prompt, new_tokens)

    def lines(self, vocabulary: int) -> Iterator[dict]:
        """The prompts as the runner's `--prompts_path` takes them; random, and always the same."""
        draw = random.Random(self.prompt)
        for _ in range(self.requests):
            line: dict = {"prompt_ids": draw.choices(range(vocabulary), k=self.prompt)}
            if self.requests > self.sequences:
                line["max_new_tokens"] = round(self.new_tokens * draw.uniform(0.5, 1.5))
            yield line

    def write(self, path: Path, vocabulary: int) -> None:
        """A file of `lines`."""
        with path.open("w") as file:
            for line in self.lines(vocabulary):
                file.write(json.dumps(line) + "\n")


def _command(runner: Path, program: Path, load: Load, folder: Path) -> list[str | Path]:
    """Runs a load whose prompts `folder` has; ids are written there, too."""
    return [
        *(runner, f"--model_path={program / 'model.pte'}"),
        f"--data_path={program / 'model.ptd'}",
        *(f"--prompts_path={folder / 'prompts'}", f"--max_sequences={load.sequences}"),
        *("--cuda_graph", f"--max_new_tokens={load.new_tokens}"),
        f"--output_ids_path={folder / 'ids'}",
    ]


def run_load(
    runner: Path, program: Path, load: Load, vocabulary: int, more: Sequence[str] = ()
) -> dict:
    """The runner's stats of the second of two runs, with further flags.

    Raises:
        RuntimeError: the runner fails; with its message.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load.write(folder / "prompts", vocabulary)
        stats = folder / "stats"
        command = _command(runner, program, load, folder)
        command += ["--num_iters=2", f"--stats_path={stats}", *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-500:] or f"exit code {done.returncode}")
        return json.loads(stats.read_text().splitlines()[-1])


def steps_of(stats: dict, sequences: int) -> dict:
    """How long a decode step took, in milliseconds, and of a program with drafts what became of
    them; nothing where nobody decoded."""
    drafts = {name: stats[name] for name in _DRAFTS if name in stats}
    duration = stats["inference_end_ms"] - stats["prompt_eval_end_ms"]
    drawn = stats["decode_token_per_sec"] * duration / 1e3
    steps = (drawn - drafts.get("accepted_draft_tokens", 0)) / sequences
    return ({"step_ms": duration / steps} if steps > 0 else {}) | drafts


_BINDINGS = b'{"methods": '
"""How the text of `get_bindings` begins (`et_moe.backends.bindings`)."""


def state_dtype(program: Path) -> str:
    """The dtype of a program's recurrent state; "float32" where it has none. Its `get_bindings` is
    read as it lies in the file, since ExecuTorch is not where programs are only run.

    Raises:
        ValueError: the file holds no such text; names it.
    """
    path = program / "model.pte"
    content = path.read_bytes()
    begin = content.find(_BINDINGS)
    try:
        end = content.index(0, begin)  # a FlatBuffer's texts end so
        state = json.loads(content[begin:end])["state"]
    except (ValueError, KeyError):
        raise ValueError(f"{path}: no get_bindings in it, which `et-moe export` writes") from None
    found = {t["dtype"] for t in state if t["name"].endswith("recurrent_state")}
    return found.pop() if found else "float32"


def _profile(runner: Path, program: Path, load: Load, vocabulary: int) -> dict:
    """The kernels of a step of all sequences, see `profile_batch`."""
    # Prompts are fed one by one, in pieces, beside those that decode already; a call may draw the
    # token that it is for and three drafts.
    calls = load.sequences * (2 + load.prompt // 1024) + 16
    load = dataclasses.replace(load, requests=load.sequences, new_tokens=calls)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load.write(folder / "prompts", vocabulary)
        return profile_batch(_command(runner, program, load, folder), folder)


def measure(
    runner: Path,
    program: Path,
    loads: list[Load],
    c: ModelConfig,
    out: Path,
    *,
    profiled: bool = False,
    prefix_cache: bool = False,
) -> bool:
    """Measures each load, and writes `out` after each.

    Args:
        profiled: whether a step of each is profiled kernel by kernel on a GPU.
        prefix_cache: whether the run that counts, the second one, takes over what the first one
            computed of the same prompts, as a conversation's next turn does.

    Returns:
        Whether no measurement failed.
    """
    gpu = measure_gpu()
    kept = state_dtype(program)
    result: dict = provenance() | {"gpu": gpu, "recurrent_state_dtype": kept, "rows": []}
    table = Table(*COLUMNS)
    for load in loads:
        row: dict = dataclasses.asdict(load)
        result["rows"].append(row)
        try:
            more = ["--prefix_cache"] if prefix_cache else []
            stats = run_load(runner, program, load, c.vocab_size, more)
        except RuntimeError as e:  # one failure must not end the benchmark
            row["error"] = str(e)
        else:
            row |= {name: stats[name] for name in (*_RATES, *_TIMES)}
            row |= steps_of(stats, load.sequences)
            if prefix_cache:
                row["cached_prompt_tokens"] = stats["cached_prompt_tokens"]
            if gpu:
                middle = load.prompt + load.new_tokens // 2
                size = 2 if kept == "bfloat16" else 4
                step = roofline.batch_step(load.sequences, c, middle, size)
                row["roof_ms"] = 1e3 * sum(kernel.seconds(**gpu["roof"]) for kernel in step)
                if profiled:
                    row["profile"] = _profile(runner, program, load, c.vocab_size)
        table.add_row(*cells(row))
        print(row, flush=True)
        write_result(out, result)
    Console(width=170).print(table)
    return not any("error" in row for row in result["rows"])
