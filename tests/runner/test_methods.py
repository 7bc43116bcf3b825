"""How the runner binds the methods of a program by name, and what it refuses when it loads one."""

from pathlib import Path

import pytest
import torch
from toy_programs import (
    DECODE,
    FLAGS,
    INPUTS,
    LOGITS,
    LONGEST,
    TOKEN,
    VOCABULARY,
    method,
    next_token,
    rewrite,
    usual,
    write,
    zeros,
)


@pytest.mark.parametrize("order", [1, -1])
def test_inputs_are_bound_by_name(runner, tmp_path: Path, order: int) -> None:
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    prompt = [1, 2, 30]
    found = runner.generate(write(tmp_path, usual(order)), prompt, 4, *flags)
    expected = [next_token(sum(prompt), 0, len(prompt))]
    while len(expected) < 4:
        expected.append(next_token(expected[-1], len(prompt) + len(expected) - 1, 1))
    assert found == expected


def refused(runner, program: Path, *messages: str) -> None:
    done = runner.run(program, "--prompt_ids=1", check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: {program / 'model.pte'}: ")
    assert done.stderr.count("\n") == 1
    assert "json.exception" not in done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda: {"decode": method("decode", [*DECODE, "window"])},
            "method decode takes an input window, which this runner does not know",
        ),
        (
            lambda: {"decode": zeros(DECODE[:-1], token=TOKEN, logits=LOGITS)},
            "method decode has no input seed",
        ),
        (
            lambda: {"prefill": method("prefill", DECODE)},
            "method prefill has no input num_tokens",
        ),
        (
            lambda: {"decode": method("decode", DECODE, top_k=torch.float32)},
            "method decode takes the input top_k as Float [1], this runner gives Long [1]",
        ),
        (
            lambda: {"prefill": method("decode", list(INPUTS))},
            "method prefill takes the input tokens as Long [1, 1], this runner gives Long [1, 2..",
        ),
        (lambda: {"decode": None}, "has no method decode"),
        (lambda: {"decode": zeros(token=TOKEN)}, "method decode has no output logits"),
        (lambda: {"decode": zeros(logits=LOGITS)}, "method decode has no output token"),
        (
            lambda: {"decode": zeros(token=TOKEN, logits=((1, 49), torch.float32))},
            "method decode returns logits as Float [1, 49], expected Float [1, 50]: get_vocab_size "
            "is 50",
        ),
        (
            lambda: {"decode": zeros(token=((1, 1), torch.int32), logits=LOGITS)},
            "method decode returns token as Int [1, 1], expected Long [1, 1]",
        ),
    ],
)
def test_methods_that_do_not_fit(runner, tmp_path: Path, changes, message: str) -> None:
    methods = {name: graph for name, graph in (usual() | changes()).items() if graph is not None}
    refused(runner, write(tmp_path, methods), message)


def test_another_vocabulary(runner, tmp_path: Path) -> None:
    program = write(tmp_path, get_vocab_size=VOCABULARY + 1)
    refused(runner, program, "logits as Float [1, 50]", "get_vocab_size is 51")


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ("get_max_seq_len", 0, "get_max_seq_len is 0, expected at least 1"),
        ("get_max_sequences", 0, "get_max_sequences is 0, expected at least 1"),
        ("get_max_sequences", 2**31 - 1, "has no method decode_batch"),
        ("get_page_size", 0, "get_page_size is 0, expected at least 1"),
        ("get_max_pages", 2**20, "get_max_pages is 1048576, expected 1 for get_max_seq_len 40"),
        ("get_max_pages", 0, "get_max_pages is 0, expected 1 for get_max_seq_len 40"),
        ("get_max_prefill_tokens", 2**31 - 1, "input tokens as Long [1, 2..16]"),
        ("get_draft_tokens", 4, "get_draft_tokens is 4, expected at most 3"),
        ("get_draft_tokens", 3, "method prefill has no input versions"),
        ("get_draft_sequences", 0, "get_draft_sequences is 0, expected 1 to 1, which get_max_seq"),
        ("get_draft_sequences", 2, "get_draft_sequences is 2, expected 1 to 1, which get_max_seq"),
    ],
)
def test_sizes_that_do_not_fit(
    runner, tmp_path: Path, constant: str, value: int, message: str
) -> None:
    """They are refused before memory is taken for them."""
    drafts = {"get_draft_tokens": 1, "get_draft_sequences": 1} if "draft" in constant else {}
    refused(runner, write(tmp_path, **(drafts | {constant: value})), message)


def test_another_longest_prompt(runner, tmp_path: Path) -> None:
    program = write(tmp_path, get_max_prefill_tokens=LONGEST + 1)
    refused(runner, program, "input tokens as Long [1, 2..16], this runner gives Long [1, 2..17]")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # The bindings contradict the program itself.
        (b'"index": 0}', b'"index": 9}', "does not return the output logits, Float [1, 50], that"),
        (b'"shape": [1]}', b'"shape": [2]}', "this runner gives Long [1]"),
        (b'"name": "seed"', b'"name": "need"', "method prefill takes an input need, which this"),
        (b'"dtype": "int64"', b'"dtype": "int65"', "unknown dtype int65"),
        (b'"shape": [1, 16]', b'"shape": [1, -6]', "the tensor tokens has a dimension of -6"),
        (b'"min_shape": [1, 2]', b'"min_shape": [9, 2]', "tensor tokens has an impossible shape"),
        (b'"hand_over"', b'"hand-over"', "hand_over"),
        (b'"methods"', b'"method "', "methods"),
    ],
)
def test_bindings_that_are_damaged(
    runner, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    program = write(tmp_path)
    rewrite(program, old, new)
    refused(runner, program, message)


def test_bindings_of_other_methods(runner, tmp_path: Path) -> None:
    """The bindings and the method both name nine tensors, but not the same ones."""
    program = write(tmp_path, get_max_prefill_tokens=2)
    rewrite(program, b'"shape": [1, 16]', b'"shape": [1,  9]')
    refused(runner, program, "method prefill does not take the input tokens, Long [1, 2..9], that")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"cpu"', b'"cpu ', "get_backend: parse error at line 1, column 6: syntax error"),
        (b'"cpu"', b"77777", "get_backend: type must be string, but is number"),
        (b'{"methods"', b'["methods"', "get_bindings: parse error at line 1, column 11: "),
        (b'"hand_over"', b'"hand-over"', "get_bindings: key 'hand_over' not found"),
        (b'"name": "seed"', b'"name": 123456', "get_bindings: type must be string, but is number"),
    ],
)
def test_constants_that_are_damaged(
    runner, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    """The message names the constant, and says what is wrong in words of its own."""
    program = write(tmp_path)
    rewrite(program, old, new)
    refused(runner, program, f"error: {program / 'model.pte'}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[49,", "parse error at line 1, column 5: syntax error"),
        ('"49"', "type must be array, but is string"),
    ],
)
def test_ids_that_end_texts_and_are_damaged(
    runner, tmp_path: Path, text: str, message: str
) -> None:
    program = write(tmp_path, get_eos_ids=text)
    refused(runner, program, f"error: {program / 'model.pte'}: get_eos_ids: {message}")


@pytest.mark.parametrize("backend", [b"mps", b"CPU"])
def test_an_unknown_backend(runner, tmp_path: Path, backend: bytes) -> None:
    program = write(tmp_path)
    rewrite(program, b'"cpu"', b'"' + backend + b'"')
    message = f'get_backend is "{backend.decode()}", expected "cpu" or "cuda"'
    refused(runner, program, message)
