"""How much of a GPU's memory a program takes, over the fake driver."""

import json
import re

import pytest

MIB = 1 << 20
MEMORY = 128 * MIB
"""Of the fake GPU. Scratch memory is taken 32 MiB at a time."""
PROMPT = [1 + i % 200 for i in range(40)]


@pytest.fixture
def run(fake, programs, tmp_path):
    """Runs 30 prompts with these flags on a GPU with so much memory."""
    lines = [{"prompt_ids": PROMPT[i:], "max_new_tokens": 5} for i in range(30)]
    prompts = tmp_path / "prompts"
    prompts.write_text("\n".join(map(json.dumps, lines)))

    def run(*flags: str, memory: int = MEMORY):
        given = (f"--prompts_path={prompts}", *flags)
        return fake.runner(programs / "cuda", *given, memory=str(memory))

    return run


def used(done) -> int:
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("PyTorch"))
    stats = json.loads(line.removeprefix("PyTorchObserver "))
    return stats["gpu_total_bytes"] - stats["gpu_free_after_generate_bytes"]


def cached(done) -> int:
    return int(re.search(r"a KV cache of (\d+) tokens", done.stderr)[1])


@pytest.mark.parametrize("graph", [(), ("--cuda_graph",)], ids=["eager", "graph"])
def test_a_fraction_of_memory_holds_all(run, fake, graph: tuple[str, ...]) -> None:
    """Weights, state and what calls take. The state takes what the others leave, to less than two
    pages."""
    found = [run("--max_sequences=2000", f"--memory_fraction={f}", *graph) for f in (0.5, 0.75, 1)]
    assert not fake.report()["violations"] and not fake.report()["leaks"]
    for done, fraction in zip(found, (0.5, 0.75, 1), strict=True):
        assert fraction * MEMORY - MIB < used(done) <= fraction * MEMORY
    assert cached(found[0]) < cached(found[1]) < cached(found[2])


def test_a_fraction_that_is_too_small(run) -> None:
    """The error says what takes how much, and what to change."""
    done = run("--max_sequences=100", "--memory_fraction=0.2")
    assert done.returncode == 1
    message = re.search(
        r"^error: .*model\.pte: too little GPU memory: with memory_fraction 0\.2\d* it may take "
        r"26 MiB of 128 MiB, and needs (\d+) MiB: (\d+) MiB for weights, code and what else is on "
        r"the GPU, (\d+) MiB for what calls take, (\d+) MiB for the state of 100 sequences and 0 "
        r"snapshots, and (\d+) MiB of KV cache for one sequence of 80 tokens: lower max_sequences,"
        r" which takes \d+ MiB each, or raise memory_fraction, or export with a shorter "
        r"--max-seq-len$",
        done.stderr,
        re.MULTILINE,
    )
    assert message, done.stderr
    whole, *parts = map(int, message.groups())
    assert whole <= sum(parts) <= whole + len(parts) and parts[1] >= 32


def test_a_state_that_is_too_large(run) -> None:
    done = run("--max_sequences=5000")
    assert done.returncode == 1
    assert "no memory for the state of 5000 sequences with 10000 pages" in done.stderr
    assert "cudaErrorMemoryAllocation" in done.stderr
    assert "lower max_sequences, or set memory_fraction" in done.stderr


def test_scratch_memory_that_there_is_not(run) -> None:
    """It is taken when a call first needs it, unless a fraction was given."""
    done = run("--max_sequences=1", memory=24 * MIB)
    assert done.returncode == 1
    advice = "too little GPU memory (lower max_sequences, or set memory_fraction): "
    assert advice + "calls take 32 MiB more" in done.stderr
    assert "cudaErrorMemoryAllocation" in done.stderr
