"""Programs for the CPU made of a few aten ops, for tests of how the runner binds methods."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from et_moe.backends.cpu import lowering
from et_moe.backends.method_graph import MethodGraph
from et_moe.backends.sealed_file import FINGERPRINT, PtdWriter, write_sealed

VOCABULARY, CONTEXT, LONGEST = 50, 40, 16
INPUTS = {
    "tokens": torch.int64,
    "positions": torch.int64,
    "slots": torch.int32,
    "pages": torch.int32,
    "num_tokens": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "seed": torch.int64,
}
DECODE = [name for name in INPUTS if name != "num_tokens"]
CONSTANTS = {
    "get_format_version": 5,
    "get_fingerprint": '{"model_type": "toy"}',
    "get_max_seq_len": CONTEXT,
    "get_max_prefill_tokens": LONGEST,
    "get_max_sequences": 1,
    "get_page_size": 64,
    "get_max_pages": 1,
    "get_vocab_size": VOCABULARY,
    "get_n_layers": 1,
    "get_eos_ids": "[]",
}
TRAILER = 24
FLAGS = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "seed": 2}


def next_token(tokens: int, position: int, count: int) -> int:
    """The token that `Toy` draws after tokens with this sum, with the sampling of `FLAGS`."""
    return (3 * tokens + 5 * position + 7 * count + 4 + 11 * 3 + 2 + 13 * 2) % VOCABULARY


class Toy(nn.Module):
    """Draws a token that depends on every input, on each in its own way."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def forward(self, inputs: list[torch.Tensor]):
        values = dict(zip(self._names, inputs, strict=True))
        total = (
            3 * values["tokens"].sum() + 5 * values["positions"] + 7 * values.get("num_tokens", 1)
        )
        total = total + (8 * values["temperature"]).long() + 11 * values["top_k"]
        # The first sequence has the first slot and the first page.
        total = total + 17 * values["slots"] + 19 * values["pages"].sum()
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
    """A method with these inputs; `prefill` has 2 to `LONGEST` tokens, `score` 4, another one 1."""
    size = {"prefill": 8, "score": 4}.get(name, 1)
    shapes = {"tokens": (1, size), "pages": (1, 1)}
    kinds = INPUTS | {"window": torch.int64} | dtypes
    inputs = [torch.zeros(shapes.get(n, 1), dtype=kinds[n]) for n in names]
    length = {1: Dim("T", min=2, max=LONGEST)} if name == "prefill" else None
    program = torch.export.export(
        model or Toy(names),
        (inputs,),
        dynamic_shapes=([length if n == "tokens" else None for n in names],),
    )
    return MethodGraph(program=program, inputs=names, outputs=list(outputs))


@functools.cache
def usual(order: int = 1) -> dict[str, MethodGraph]:
    """Methods of `Toy` that take their inputs in the order of `INPUTS` or in the reverse order."""
    return {
        "prefill": method("prefill", list(INPUTS)[::order]),
        "decode": method("decode", DECODE[::order]),
    }


@functools.cache
def _usual_program() -> bytes:
    return lowering.lower(usual(), CONSTANTS).pte


def write(folder: Path, methods: dict[str, MethodGraph] | None = None, **constants) -> Path:
    """Writes a program of these methods, or of the usual ones, and a file without weights."""
    if methods is None and not constants:
        pte = _usual_program()
    else:
        pte = lowering.lower(methods or usual(), CONSTANTS | constants).pte
    write_sealed(folder / "model.pte", pte)
    with PtdWriter(folder / "model.ptd", {}, {FINGERPRINT: CONSTANTS["get_fingerprint"]}):
        pass
    return folder


class Zeros(nn.Module):
    """Returns zeros of these shapes and dtypes."""

    def __init__(self, outputs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self._outputs = list(outputs.values())

    def forward(self, inputs: list[torch.Tensor]):
        total = sum(i.sum() for i in inputs)
        return tuple(torch.zeros(s, dtype=d) + (total * 0).to(d) for s, d in self._outputs)


LOGITS, TOKEN = ((1, VOCABULARY), torch.float32), ((1, 1), torch.int64)


def zeros(inputs: list[str] = DECODE, **outputs) -> MethodGraph:
    """A `decode` that returns zeros."""
    return method("decode", inputs, Zeros(outputs), list(outputs))


def rewrite(program: Path, old: bytes, new: bytes) -> None:
    """Replaces a part of the program's bytes and seals it again."""
    assert len(old) == len(new) and old != new
    whole = (program / "model.pte").read_bytes()[:-TRAILER]
    assert old in whole
    write_sealed(program / "model.pte", whole.replace(old, new, 1))
