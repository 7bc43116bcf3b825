"""Scoring texts: the method `score`, windows, and logits that are read while they are computed."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_programs import (
    CONTEXT,
    INPUTS,
    LONGEST,
    TOKEN,
    VOCABULARY,
    Zeros,
    method,
    usual,
    write,
)
from transformers import AutoModelForCausalLM

from et_moe.serving.llm import LLM, SamplingParams

PIECE = 64
LENGTHS = (2, 3, PIECE, PIECE + 1, PIECE + 2, 2 * PIECE + 1, 256)
"""A window of n tokens takes n - 1 rows: around the ends of one call, and of two."""
PROGRAMS = ("plain", "score", "drafts")


def window(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 264, (length,), generator=generator).tolist()


WINDOWS = [window(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def reference(scored_model: Path) -> list[torch.Tensor]:
    """What Hugging Face's model gives for `WINDOWS`, float32 [n - 1, V] each."""
    model = AutoModelForCausalLM.from_pretrained(scored_model / "checkpoint", dtype=torch.float32)
    with torch.no_grad():
        found = [model.eval()(torch.tensor([w]), use_cache=False).logits[0, :-1] for w in WINDOWS]
    return found


@pytest.fixture
def score(runner, tmp_path: Path):
    """Scores what is given, and returns the logits and the log-probabilities."""

    def run(program: Path, ids: list) -> tuple[np.ndarray, list]:
        given, logits, logprobs = (tmp_path / name for name in ("ids", "logits", "logprobs"))
        given.write_text(json.dumps(ids))
        flags = (f"--logits_path={logits}", f"--logprobs_path={logprobs}")
        runner.run(program, f"--score_ids_path={given}", *flags)
        return np.load(logits), json.loads(logprobs.read_text())

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_are_those_of_hugging_face(score, scored_model, reference, program: str) -> None:
    logits, logprobs = score(scored_model / program, WINDOWS)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, torch.cat(reference).numpy(), rtol=0, atol=1e-5)
    for ids, rows, found in zip(WINDOWS, reference, logprobs, strict=True):
        expected = rows.double().log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
        np.testing.assert_allclose(found, expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("program", ["plain", "score"])
def test_a_window_alone_is_as_among_others(score, scored_model, program: str) -> None:
    """Each begins with a state of its own, and gives the same bits."""
    logits, logprobs = score(scored_model / program, WINDOWS)
    alone, found = score(scored_model / program, WINDOWS[4])
    begin = sum(len(w) - 1 for w in WINDOWS[:4])
    assert np.array_equal(alone, logits[begin : begin + len(alone)]) and found == logprobs[4]


@pytest.mark.parametrize("program", ["score", "drafts"])
@pytest.mark.parametrize("length", [2, PIECE + 1, 2 * PIECE + 7])
def test_what_was_scored_is_gone_on_with(run_engine, scored_model, program, length: int) -> None:
    """The tokens behind depend on every state tensor: `score` leaves what `prefill` does."""
    ids, behind = window(length), [5, 6, 7]
    _, scored, fed = run_engine(
        scored_model / program,
        {"score": [*ids, 1]},
        {"append": behind, "max_new_tokens": 12},
        {"generate": [*ids, *behind], "max_new_tokens": 12},
    )
    assert scored == fed


def test_a_callback_that_throws(run_engine, scored_model) -> None:
    """The whole piece that was fed before it counts."""
    ids = window(PIECE - 3)
    error, got, expected = run_engine(
        scored_model / "score",
        {"score": ids, "throw_at": 3},
        {"append": [5], "max_new_tokens": 12},
        {"generate": [*ids[:-1], 5], "max_new_tokens": 12},
    )
    assert error == {"error": "thrown"} and got == expected


@pytest.mark.parametrize("program", ["score", "drafts"])
@pytest.mark.parametrize("length", [1, 2, PIECE, PIECE + 1, 150])
def test_prompts_with_log_probabilities(scored_model, program: str, length: int) -> None:
    """What the server gives for `echo` with `logprobs`, through `score` and one by one; and what
    the prompt leaves for others that begin with it."""
    params = SamplingParams(max_tokens=5, prompt_logprobs=2, logprobs=1)
    answers = []
    for name in ("plain", program):
        with LLM(scored_model / name, max_sequences=2) as llm:
            first, second = llm.generate([window(length)] * 2, params)
            behind = llm.generate([[*window(length), 9]], SamplingParams(max_tokens=5))[0]
        assert first.prompt_logprobs == second.prompt_logprobs
        answers.append((first, behind))
    (expected, expected_behind), (found, behind) = answers
    assert behind.outputs[0].token_ids == expected_behind.outputs[0].token_ids
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert found.prompt_logprobs[0] is None and len(found.prompt_logprobs) == length
    both = (
        (expected.prompt_logprobs[1:], found.prompt_logprobs[1:]),
        (expected.outputs[0].logprobs, found.outputs[0].logprobs),
    )
    for one, other in (pair for lists in both for pair in zip(*lists, strict=True)):
        assert abs(one.logprob - other.logprob) < 1e-5
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "scoring needs at least two token ids"),
        ([[]], "window 0: scoring needs at least two token ids"),
        ([[1, 2], [3]], "window 1: scoring needs at least two token ids"),
        ([[1, 2], [3, 264]], "window 1: token id 264 is outside the vocabulary of 264"),
        ([[-1, 2], [3, 4]], "window 0: token id -1 is outside the vocabulary of 264"),
        ([1, 264], "token id 264 is outside the vocabulary of 264"),
        ([[1, 2], [7] * 258], "window 1: 258 tokens do not fit the context of 256"),
        ([1, [2]], "entry 1 is not a token id"),
        ([[1, 2], 3], "entry 1 is not a list of token ids"),
        ([[1, 2], [3, "4"]], "entry 1 of list 1 is not a token id"),
        ([[1, [2]]], "entry 1 of list 0 is not a token id"),
        ({"ids": [1, 2]}, "expected a JSON list of token ids"),
    ],
)
@pytest.mark.parametrize("program", ["plain", "score"])
def test_windows_that_are_refused(
    runner, scored_model, tmp_path: Path, program: str, ids: list, message: str
) -> None:
    """Before anything is computed or written."""
    given = tmp_path / "ids"
    given.write_text(json.dumps(ids))
    flags = (f"--score_ids_path={given}", f"--logits_path={tmp_path / 'logits'}")
    done = runner.run(scored_model / program, *flags, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: {given}: {message}\n")
    assert list(tmp_path.iterdir()) == [given]


def start(runner, program: Path, tmp_path: Path, logits: str, **options) -> subprocess.Popen:
    given = tmp_path / "ids"
    given.write_text(json.dumps(WINDOWS))
    command = [runner.binary, f"--model_path={program / 'model.pte'}"]
    command += [f"--data_path={program / 'model.ptd'}", f"--score_ids_path={given}"]
    command += [f"--logits_path={logits}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("kind", ["fifo", "descriptor"])
def test_logits_are_read_as_they_come(score, runner, scored_model, tmp_path, kind: str) -> None:
    """A pipe holds fewer rows than there are."""
    program = scored_model / "score"
    expected, _ = score(program, WINDOWS)
    if kind == "fifo":
        os.mkfifo(tmp_path / "pipe")
        process = start(runner, program, tmp_path, str(tmp_path / "pipe"))
        file = (tmp_path / "pipe").open("rb")
    else:
        reading, writing = os.pipe()
        options = {"pass_fds": (writing,)}
        process = start(runner, program, tmp_path, f"/dev/fd/{writing}", **options)
        os.close(writing)
        file = os.fdopen(reading, "rb")
    with file:
        major_minor = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        rows = np.frombuffer(file.read(), dtype).reshape(shape)
    assert process.wait(timeout=60) == 0 and major_minor == (1, 0)
    assert np.array_equal(rows, expected)


def test_a_reader_that_leaves(runner, scored_model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = start(runner, scored_model / "score", tmp_path, str(tmp_path / "pipe"))
    with (tmp_path / "pipe").open("rb") as file:
        file.read(1000)
    _, errors = process.communicate(timeout=60)
    message = f"error: {tmp_path / 'pipe'}: cannot be written: Broken pipe\n"
    assert (process.returncode, errors) == (1, message)


def score_method(rows: int, wide: int = VOCABULARY):
    """A toy method of 4 tokens that returns so many logits, all 0."""
    outputs = {"token": TOKEN, "logits": ((rows, wide), torch.float32)}
    return method("score", list(INPUTS), Zeros(outputs), list(outputs))


@pytest.mark.parametrize(
    ("count", "make", "message"),
    [
        (4, None, "has no method score"),
        (17, lambda: score_method(4), f"get_score_tokens is 17, expected at most {LONGEST}, which"),
        (5, lambda: score_method(4), "method score takes the input tokens as Long [1, 4], this"),
        (4, lambda: score_method(1), "method score returns logits as Float [1, 50], expected"),
        (4, lambda: score_method(4, 49), "returns logits as Float [4, 49], expected Float [4, 50]"),
    ],
)
def test_methods_that_do_not_fit(runner, tmp_path: Path, count: int, make, message: str) -> None:
    methods = usual() | ({"score": make()} if make else {})
    program = write(tmp_path, methods, get_score_tokens=count)
    done = runner.run(program, "--prompt_ids=1", check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {program / 'model.pte'}: ")
    assert message in done.stderr


def test_a_call_always_has_as_many_rows(score, tmp_path: Path) -> None:
    program = write(tmp_path, usual() | {"score": score_method(4)}, get_score_tokens=4)
    logits, _ = score(program, [[1] * n for n in (2, 5, CONTEXT + 1)])
    assert logits.shape == (1 + 4 + CONTEXT, VOCABULARY) and not logits.any()
