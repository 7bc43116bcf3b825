"""What a GPU must reproduce of a model, and how it is compared.

The CPU program of the same weights says what is right. Where its two likeliest tokens are close, a
rounding decides between them, so tokens are compared only up to the first near tie; the margin is
the difference of the two highest logits over the standard deviation of the row.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

MANIFEST = "manifest.json"
EXPECTED_LOGITS = "expected.npy"

Run = Callable[[Sequence[str | Path]], None]
"""Runs a command; raises if it fails."""


@dataclass(frozen=True)
class Tolerance:
    """How far a program may be from the fp32 program of the CPU.

    Activations that are rounded to INT8 differ by a whole step where two programs differ in the
    last bits, and the recurrent state carries that on. On an H200 the fp32 programs of the tiny and
    of the demo model have relative errors of 0.006 and 0.009, bf16 programs of 0.01 to 0.06. The
    likeliest token is then another one at 1% to 9% of the positions, since a fourth of them have a
    margin below 0.1. The bf16 program of the CPU has an error of 0.02 to 0.04 on the demo model's
    held-out text, and every token that differs has a margin under 0.23.

    Attributes:
        margin: a token must be the same if its margin is at least this.
        relative_error: the largest relative error of the logits, in the L2 norm over all positions.
    """

    margin: float
    relative_error: float


TOLERANCES = {"float32": Tolerance(0.1, 0.02), "bfloat16": Tolerance(0.5, 0.1)}


@dataclass(frozen=True)
class Case:
    """A prompt and the greedy tokens that must follow it; `least_margin` is the least of theirs."""

    prompt_ids: list[int]
    expected_ids: list[int]
    least_margin: float


@dataclass(frozen=True)
class Model:
    """A program and what it must compute; `model.pte` and `model.ptd` are in a folder of its name.

    Attributes:
        dtype: the type of its activations, a key of `TOLERANCES`.
        cases: in order from the shortest prompt to the longest.
        score_ids: tokens whose logits, float32 [len - 1, vocabulary], are in `EXPECTED_LOGITS`.
    """

    name: str
    dtype: str
    cases: list[Case]
    score_ids: list[int]

    @classmethod
    def from_json(cls, entry: dict) -> "Model":
        cases = [Case(**case) for case in entry["cases"]]
        return cls(entry["name"], entry["dtype"], cases, entry["score_ids"])

    to_json = asdict


@dataclass(frozen=True)
class Program:
    """A program, and how it is run.

    Attributes:
        runner: the runner's binary.
        folder: the folder that holds `model.pte` and `model.ptd`.
        scratch: the folder for what the runner writes.
        flags: further flags of the runner, such as `--cuda_graph`.
    """

    run: Run
    runner: Path
    folder: Path
    scratch: Path
    flags: tuple[str, ...] = ()

    def command(self, *flags: str) -> list[str | Path]:
        files = (f"--model_path={self.folder / 'model.pte'}",)
        files += (f"--data_path={self.folder / 'model.ptd'}",)
        return [self.runner, *files, *self.flags, *flags]

    def generate(self, prompt_ids: list[int], count: int) -> list[int]:
        """At most `count` greedy tokens."""
        output = self.scratch / "ids.json"
        output.unlink(missing_ok=True)
        flags = (f"--prompt_ids={','.join(map(str, prompt_ids))}", f"--max_new_tokens={count}")
        self.run(self.command(*flags, "--temperature=0", f"--output_ids_path={output}"))
        return json.loads(output.read_text())

    def answer(self, requests: Sequence[dict], *flags: str) -> tuple[list[list[int]], dict]:
        """The tokens of requests, lines of `--prompts_path`, which share decode calls, and the
        stats."""
        names = ("prompts.jsonl", "ids.json", "stats.json")
        prompts, output, stats = (self.scratch / name for name in names)
        output.unlink(missing_ok=True)
        prompts.write_text("".join(json.dumps(request) + "\n" for request in requests))
        files = (f"--prompts_path={prompts}", f"--output_ids_path={output}")
        self.run(self.command(*files, f"--stats_path={stats}", *flags))
        return json.loads(output.read_text()), json.loads(stats.read_text())

    def generate_at_once(self, cases: Sequence["Case"]) -> list[list[int]]:
        """The greedy tokens of several cases."""
        requests = [
            {"prompt_ids": case.prompt_ids, "max_new_tokens": len(case.expected_ids)}
            for case in cases
        ]
        return self.answer(requests, "--temperature=0")[0]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Teacher-forced logits that predict ids[1:], float32 [len(ids) - 1, vocabulary]."""
        output, given = self.scratch / "logits.npy", self.scratch / "score_ids.json"
        output.unlink(missing_ok=True)
        given.write_text(json.dumps(ids))
        self.run(self.command(f"--score_ids_path={given}", f"--logits_path={output}"))
        return np.load(output)


def margins(logits: np.ndarray) -> np.ndarray:
    """The margin of the likeliest token in each row of logits [rows, vocabulary]."""
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return (first - second) / logits.std(axis=-1)


def make_case(program: Program, prompt_ids: list[int], count: int, margin: float) -> Case:
    """A case of at most `count` greedy tokens, which end before the first with a smaller margin."""
    ids = program.generate(prompt_ids, count)
    logits = program.logits(prompt_ids + ids)[len(prompt_ids) - 1 :]
    sizes = margins(logits)
    near = np.flatnonzero(sizes < margin)
    settled = int(near[0]) if len(near) else len(ids)
    return Case(prompt_ids, ids[:settled], float(sizes[:settled].min()) if settled else 0.0)


def compare_tokens(actual: list[int], expected: list[int]) -> str | None:
    """Where two token lists differ, or None."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=False)):
        if a != e:
            return f"token {i} of {len(expected)} is {a}, expected {e}"
    if len(actual) != len(expected):
        return f"{len(actual)} tokens, expected {len(expected)}"
    return None


def compare_logits(actual: np.ndarray, expected: np.ndarray, margin: float) -> dict[str, float]:
    """The share of rows with the same likeliest token, of all and of those whose margin is at
    least `margin`, how many these are, and the relative L2 error.

    NaN counts as wrong.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"logits of shape {actual.shape}, expected {expected.shape}")
    same = (actual.argmax(-1) == expected.argmax(-1)) & np.isfinite(actual).all(-1)
    difference, size = (np.linalg.norm(x.astype("f8")) for x in (actual - expected, expected))
    error = difference / size if size else np.inf
    settled = same[margins(expected) >= margin]
    return {
        "top1": float(same.mean()),
        "settled": len(settled),
        "settled_top1": float(settled.mean()) if len(settled) else 0.0,
        "relative_error": float(error),
    }


def check_tokens(program: Program, case: Case) -> dict:
    """What was found of a case; its `error` is None, or says which token differs."""
    actual = program.generate(case.prompt_ids, len(case.expected_ids))
    return {"error": compare_tokens(actual, case.expected_ids)}


def check_batch(program: Program, cases: list[Case]) -> dict:
    """What was found of several cases at once, each of which must have the tokens that it has
    alone; its `error` names the first that differs."""
    for case, actual in zip(cases, program.generate_at_once(cases), strict=True):
        if error := compare_tokens(actual, case.expected_ids):
            return {"error": f"prompt of {len(case.prompt_ids)} tokens: {error}"}
    return {"error": None}


def check_logits(program: Program, model: Model) -> dict:
    """The measures of `compare_logits`, with an `error` if they are out of tolerance."""
    expected = np.load(program.folder / EXPECTED_LOGITS)
    allowed = TOLERANCES[model.dtype]
    found = compare_logits(program.logits(model.score_ids), expected, allowed.margin)
    if found["settled_top1"] == 1 and found["relative_error"] <= allowed.relative_error:
        return {**found, "error": None}
    error = f"top-1 agreement {found['settled_top1']:.3f} of {found['settled']} positions without a"
    error += f" near tie, expected 1; relative error {found['relative_error']:.4f}, "
    return {**found, "error": f"{error}expected at most {allowed.relative_error}"}


def check_model(program: Program, model: Model, cases: list[Case]) -> Iterator[dict]:
    """Yields what each check found; a check that cannot be made gives the reason as `error`."""
    checks: list[tuple[dict, Callable[[], dict]]] = []
    for case in cases:
        head = {"check": "tokens", "prompt_tokens": len(case.prompt_ids)}
        head |= {"new_tokens": len(case.expected_ids), "least_margin": case.least_margin}
        checks.append((head, lambda case=case: check_tokens(program, case)))
    if cases:
        head = {"check": "batch", "sequences": len(cases)}
        checks.append((head, lambda: check_batch(program, cases)))
    head = {"check": "logits", "positions": len(model.score_ids) - 1}
    head |= {"tolerance": asdict(TOLERANCES[model.dtype])}
    checks.append((head, lambda: check_logits(program, model)))
    for head, check in checks:
        try:
            yield head | check()
        except (RuntimeError, ValueError, OSError) as e:
            yield head | {"error": f"{type(e).__name__}: {e}"}
