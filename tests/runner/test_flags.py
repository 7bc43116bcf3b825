"""Flags of the runner whose values are refused: what the message says, and how long it is."""

import subprocess
from pathlib import Path

import pytest

INT64 = "not in range -9223372036854775808 to 9223372036854775807"
FLAGS = {
    "--temperature=-1": "temperature -1: expected 0 (greedy) or at least 1e-5",
    "--temperature=nan": "temperature nan: expected 0 (greedy) or at least 1e-5",
    "--temperature=inf": "temperature inf: expected 0 (greedy) or at least 1e-5",
    "--temperature=1e-40": "temperature 1e-40: expected 0 (greedy) or at least 1e-5",
    "--temperature=warm": "--temperature",
    "--top_p=0": "top_p 0: expected more than 0 and at most 1",
    "--top_p=-0.5": "top_p -0.5: expected more than 0 and at most 1",
    "--top_p=1.0000001": "top_p 1.0000001: expected more than 0 and at most 1",
    "--temperature=0.0000099999": "temperature 9.9999e-06: expected 0 (greedy) or at least 1e-5",
    "--top_p=1.5": "top_p 1.5: expected more than 0 and at most 1",
    "--top_p=nan": "top_p nan: expected more than 0 and at most 1",
    "--top_k=-1": "top_k -1: expected 0 (off) or more",
    "--top_k=1.5": "--top_k",
    "--max_new_tokens=0": "max_new_tokens 0: expected at least 1",
    "--max_new_tokens=-3": "max_new_tokens -3: expected at least 1",
    "--max_new_tokens=many": "--max_new_tokens",
    "--seed=x": "--seed",
    f"--seed={10**30}": f"--seed: Value {10**30} {INT64}",
    f"--seed=+{10**30}": f"--seed: Value +{10**30} {INT64}",
    f"--seed={2**63}": f"--seed: Value {2**63} {INT64}",
    f"--seed={-(2**63) - 1}": f"--seed: Value {-(2**63) - 1} {INT64}",
    f"--top_k={2**63}": f"--top_k: Value {2**63} {INT64}",
    f"--max_new_tokens={2**63}": f"--max_new_tokens: Value {2**63} {INT64}",
    "--warmup=-1": "--warmup: Value -1 not in range",
    "--num_iters=0": "--num_iters: Value 0 not in range",
    "--prompt=x": "Exactly 1 option from",
    "--logprobs_path=x": "--logprobs_path requires --score_ids_path",
    "--logits_path=x": "--logits_path requires --score_ids_path",
    "--no_such_flag": "--no_such_flag",
    "stray": "stray",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(refused, flag: str) -> None:
    refused("--prompt_ids=1", flag, parts=[FLAGS[flag]])


@pytest.mark.parametrize("flag", ["--warmup", "--num_iters"])
def test_flags_that_scoring_has_not(refused, flag: str) -> None:
    score = ("--score_ids_path=x", "--logits_path=y")
    refused(*score, f"{flag}=1", parts=[f"{flag} excludes --score_ids_path"])


def test_long_values_are_cut_short(refused) -> None:
    """A message must not be as long as what it complains of."""
    many = "9" * 100_000
    for flags in (
        (f"--prompt_ids={many}",),
        *(("--prompt_ids=1", f"--{name}={many}") for name in INTEGERS),
        *(("--prompt_ids=1", f"--{name}={many}x") for name in (*INTEGERS, *NUMBERS)),
    ):
        assert len(refused(*flags, parts=[flags[-1].split("=")[0], "9" * 40 + "..."])) < 300


INTEGERS = ["max_new_tokens", "top_k", "seed", "warmup", "num_iters"]
NUMBERS = ["temperature", "top_p"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("text", ["010", "-010", "0x10", "0b1", "0o7", "1_000", "1'000", "1e3", ""])
def test_integers_are_decimal(refused, name: str, text: str) -> None:
    """CLI11 reads 010 as 8, and much more."""
    refused("--prompt_ids=1", f"--{name}", text, parts=[f"--{name}", "no decimal integer"])


PATHS = ["model_path", "data_path", "tokenizer_path", "prompt_file", "score_ids_path"]
PATHS += ["logprobs_path", "logits_path", "output_ids_path", "stats_path"]


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_are_empty(runner, tiny_program: Path, name: str) -> None:
    flags = {"model_path": "model.pte", "data_path": "model.ptd", "tokenizer_path": ""}
    command = [runner.binary]
    for flag, file in flags.items():
        if flag != name:
            command += [f"--{flag}", tiny_program / file]
    command += [f"--{name}", ""]
    if name not in ("prompt_file", "score_ids_path"):
        score = name in ("logprobs_path", "logits_path")
        command.append("--score_ids_path=x" if score else "--prompt_ids=1")
    done = subprocess.run(command, capture_output=True, text=True)
    message = f"--{name}: expected a path, got an empty text"
    assert done.returncode > 0 and message in done.stderr, done.stderr
