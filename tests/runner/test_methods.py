"""How the runner binds the methods of a program by name, and what it refuses when it loads one."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from et_moe.backends.cpu import lowering
from et_moe.backends.method_graph import MethodGraph
from et_moe.backends.sealed_file import PtdWriter, write_sealed

VOCABULARY, CONTEXT, LONGEST = 50, 40, 16
INPUTS = {
    "tokens": torch.int64,
    "position": torch.int64,
    "num_tokens": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "seed": torch.int64,
}
CONSTANTS = {
    "get_format_version": 2,
    "get_max_seq_len": CONTEXT,
    "get_max_prefill_tokens": LONGEST,
    "get_vocab_size": VOCABULARY,
    "get_n_layers": 1,
    "get_eos_ids": "[]",
}
FLAGS = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 2}


def next_token(tokens: int, position: int, count: int) -> int:
    """What `Toy` draws after tokens of this sum, with the sampling of `FLAGS`."""
    return (3 * tokens + 5 * position + 7 * count + 4 + 11 * 3 + 2 + 13 * 2) % VOCABULARY


class Toy(nn.Module):
    """Draws a token that every input has a part in, each in its own way."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def forward(self, inputs: list[torch.Tensor]):
        values = dict(zip(self._names, inputs, strict=True))
        total = (
            3 * values["tokens"].sum() + 5 * values["position"] + 7 * values.get("num_tokens", 1)
        )
        total = total + (8 * values["temperature"]).long() + 11 * values["top_k"]
        total = total + (8 * values["top_p"]).long() + 13 * values["seed"]
        token = (total % VOCABULARY).view(1, 1)
        return (torch.arange(VOCABULARY) == token).float(), token


def method(
    name: str,
    names: list[str],
    model: nn.Module | None = None,
    outputs: Sequence[str] = ("logits", "token"),
    **dtypes,
) -> MethodGraph:
    size = 1 if name == "decode" else 8
    kinds = INPUTS | {"window": torch.int64} | dtypes
    inputs = [torch.zeros((1, size) if n == "tokens" else 1, dtype=kinds[n]) for n in names]
    length = {1: Dim("T", min=2, max=LONGEST)} if size > 1 else None
    program = torch.export.export(
        model or Toy(names),
        (inputs,),
        dynamic_shapes=([length if n == "tokens" else None for n in names],),
    )
    return MethodGraph(program=program, inputs=names, outputs=list(outputs))


def graphs(order: int = 1, **changes) -> dict[str, MethodGraph]:
    """Methods that take their inputs in this order or its reverse; `changes`: other graphs."""
    prefill = list(INPUTS)[::order]
    decode = [name for name in prefill if name != "num_tokens"]
    usual = {"prefill": method("prefill", prefill), "decode": method("decode", decode)}
    return {name: graph for name, graph in (usual | changes).items() if graph is not None}


def write(folder: Path, methods: dict[str, MethodGraph], **constants) -> Path:
    write_sealed(folder / "model.pte", lowering.lower(methods, CONSTANTS | constants).pte)
    with PtdWriter(folder / "model.ptd", {}):
        pass
    return folder


@pytest.mark.parametrize("order", [1, -1])
def test_inputs_are_bound_by_name(runner, tmp_path: Path, order: int) -> None:
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    prompt = [1, 2, 30]
    found = runner.generate(write(tmp_path, graphs(order)), prompt, 4, *flags)
    expected = [next_token(sum(prompt), 0, len(prompt))]
    while len(expected) < 4:
        expected.append(next_token(expected[-1], len(prompt) + len(expected) - 1, 1))
    assert found == expected


def refused(runner, program: Path, *messages: str) -> None:
    done = runner.run(program, "--prompt_ids=1", check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: {program / 'model.pte'}: ")
    assert done.stderr.count("\n") == 1
    for message in messages:
        assert message in done.stderr, done.stderr


class Zeros(nn.Module):
    """Returns zeros of these shapes and dtypes."""

    def __init__(self, outputs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self._outputs = list(outputs.values())

    def forward(self, inputs: list[torch.Tensor]):
        total = sum(i.sum() for i in inputs)
        return tuple(torch.zeros(s, dtype=d) + (total * 0).to(d) for s, d in self._outputs)


DECODE = [name for name in INPUTS if name != "num_tokens"]
LOGITS, TOKEN = ((1, VOCABULARY), torch.float32), ((1, 1), torch.int64)


def zeros(inputs: list[str] = DECODE, **outputs) -> MethodGraph:
    """A `decode` that returns zeros."""
    return method("decode", inputs, Zeros(outputs), list(outputs))


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
            lambda: {"prefill": method("prefill", [n for n in INPUTS if n != "num_tokens"])},
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
    refused(runner, write(tmp_path, graphs(**changes())), message)


def test_another_vocabulary(runner, tmp_path: Path) -> None:
    program = write(tmp_path, graphs(), get_vocab_size=VOCABULARY + 1)
    refused(runner, program, "logits as Float [1, 50]", "get_vocab_size is 51")


def test_another_longest_prompt(runner, tmp_path: Path) -> None:
    program = write(tmp_path, graphs(), get_max_prefill_tokens=LONGEST + 1)
    refused(runner, program, "input tokens as Long [1, 2..16], this runner gives Long [1, 2..17]")


def edited(program: Path, tmp_path: Path, change) -> Path:
    """The program with what `change` makes of the text of its bindings, of the same length."""
    whole = (program / "model.pte").read_bytes()[:-24]
    start = whole.index(b'{"methods"')
    text = whole[start : whole.index(b"\0", start)]
    changed = change(text)
    assert len(changed) == len(text) and changed != text
    write_sealed(tmp_path / "model.pte", whole.replace(text, changed))
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # The program itself says otherwise.
        (b'"index": 0}', b'"index": 9}', "does not return the output logits, Float [1, 50], that"),
        (
            b'"name": "seed"',
            b'"name": "need"',
            "takes an input need, which this runner does not know",
        ),
        (b'"dtype": "int64"', b'"dtype": "int65"', "unknown dtype int65"),
        (b'"shape": [1, 16]', b'"shape": [1, -6]', "the tensor tokens has a dimension of -6"),
        (b'"hand_over"', b'"hand-over"', "hand_over"),
    ],
)
def test_bindings_that_are_damaged(
    runner, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    program = write(tmp_path, graphs())

    def change(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new, 1)

    refused(runner, edited(program, tmp_path, change), message)


@pytest.mark.parametrize("backend", ["mps", "CPU"])
def test_an_unknown_backend(runner, tmp_path: Path, backend: str) -> None:
    program = write(tmp_path, graphs())
    whole = (program / "model.pte").read_bytes()[:-24]
    assert whole.count(b'"cpu"') == 1
    write_sealed(program / "model.pte", whole.replace(b'"cpu"', json.dumps(backend).encode()))
    refused(runner, program, f'get_backend is "{backend}", expected "cpu" or "cuda"')
