"""Faults that show when a program computes and can come from the program or from its weights: the
message names both files, and no request is blamed."""

import struct
from pathlib import Path

import pytest
import torch
import toy_programs
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorHeader,
    _deserialize_to_flat_tensor,
)
from file_fuzzer import FileFuzzer
from torch import nn
from torch.export import Dim
from toy_programs import DECODE, INPUTS, VOCABULARY

from et_moe.backends.method_graph import MethodGraph
from et_moe.serving.llm import LLM, GenerationError, SamplingParams


def both(program: Path) -> str:
    return f"{program / 'model.pte'} with {program / 'model.ptd'}: "


SEVERAL = [*DECODE, "num_tokens"]
METHODS = ("prefill", "decode", "decode_batch")


class Draws(nn.Module):
    """Draws `seed` where `top_k` says so, and else the token 1."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self._top_k = top_k

    def forward(self, inputs: list[torch.Tensor]):
        values = dict(zip(DECODE, inputs, strict=False))
        nothing = sum(i.sum() for i in inputs).long() * 0
        chosen = values["top_k"] + nothing == torch.arange(self._top_k, self._top_k + 1)
        token = (chosen.long() * (values["seed"] + -1) + 1).view(-1, 1)
        return (token * 0).float() + torch.zeros(VOCABULARY), token


def decode_batch(model: nn.Module) -> MethodGraph:
    """A method for two or three sequences."""
    shapes = {"tokens": (2, 1), "pages": (2, 1)}
    inputs = [torch.zeros(shapes.get(name, 2), dtype=INPUTS[name]) for name in SEVERAL]
    sequences = [{0: Dim("B", min=2, max=3)}] * len(inputs)
    program = torch.export.export(model, (inputs,), dynamic_shapes=(sequences,))
    return MethodGraph(program=program, inputs=SEVERAL, outputs=["logits", "token"])


@pytest.fixture(scope="module")
def program_that_draws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of which one method draws what the seed says, the one that top_k numbers."""
    inputs = {"prefill": SEVERAL, "decode": DECODE}
    methods = {
        name: toy_programs.method(name, names, Draws(METHODS.index(name)))
        for name, names in inputs.items()
    }
    methods["decode_batch"] = decode_batch(Draws(METHODS.index("decode_batch")))
    return toy_programs.write(tmp_path_factory.mktemp("draws"), methods, get_max_sequences=3)


@pytest.mark.parametrize("token", [-13, VOCABULARY, 2**62])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_outside_the_vocabulary(
    runner, program_that_draws: Path, tmp_path: Path, method: str, token: int
) -> None:
    """A program draws one, and nobody gave it one."""
    prompts, output = tmp_path / "prompts", tmp_path / "ids.json"
    prompts.write_text('{"prompt_ids": [1, 2]}\n' * 2)
    message = f"{both(program_that_draws)}the token {token} is drawn, expected 0 to 49"
    flags = [f"--seed={token}", f"--top_k={METHODS.index(method)}", "--max_new_tokens=3"]
    flags.append(f"--output_ids_path={output}")
    source, places = "--prompt_ids=1,2", [""]
    if method == "decode_batch":  # either of them may be the first that is heard of
        source, places = f"--prompts_path={prompts}", [f"{prompts}:1: ", f"{prompts}:2: "]
    done = runner.run(program_that_draws, source, *flags, check=False)
    assert done.returncode == 1 and not output.exists()
    endings = tuple(f"error: {where}{message}\n" for where in places)
    assert done.stderr.endswith(endings), done.stderr


def ptd_with(program: Path, name: str, value: float) -> bytes:
    """The program's weights, sealed, with one number in all of a float32 tensor."""
    whole = (program / "model.ptd").read_bytes()
    header = FlatTensorHeader.from_bytes(whole[8:])
    tables = _deserialize_to_flat_tensor(whole[: header.flatbuffer_offset + header.flatbuffer_size])
    index = next(entry.segment_index for entry in tables.named_data if entry.key == name)
    segment = tables.segments[index]
    begin = header.segment_base_offset + segment.offset
    fuzzer = FileFuzzer("ptd", whole)
    data = bytearray(fuzzer.data)
    data[begin : begin + segment.size] = struct.pack("<f", value) * (segment.size // 4)
    return fuzzer.seal(bytes(data))


@pytest.fixture
def broken_weights(tiny_program: Path, tmp_path: Path) -> Path:
    """A program folder whose weights give logits that are NaN."""
    folder = tmp_path / "program"
    folder.mkdir()
    for path in tiny_program.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "model.ptd").unlink()
    (folder / "model.ptd").write_bytes(ptd_with(tiny_program, "norm.weight", float("nan")))
    return folder


@pytest.mark.parametrize("source", ["prompt_ids=1,2", "score_ids_path", "prompts_path"])
def test_logits_that_are_no_numbers(runner, broken_weights, tmp_path: Path, source: str) -> None:
    ids, prompts = tmp_path / "ids.json", tmp_path / "prompts"
    ids.write_text("[1, 2, 3]")
    prompts.write_text('{"prompt_ids": [1, 2]}\n' * 2)
    flags = {
        "score_ids_path": [f"--score_ids_path={ids}", f"--logprobs_path={tmp_path / 'out'}"],
        "prompts_path": [f"--prompts_path={prompts}"],
    }
    done = runner.run(broken_weights, *flags.get(source, [f"--{source}"]), check=False)
    method = "decode" if source == "score_ids_path" else "prefill"
    where = f"{prompts}:1: the device failed: " if source == "prompts_path" else ""
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert f"error: {where}{both(broken_weights)}method {method} failed: " in done.stderr
    assert "logits: token 0 of sequence 0 has nan" in done.stderr


def test_a_server_says_so_too(broken_weights: Path) -> None:
    """Every request fails so, and then the engine says that it is broken."""
    with LLM(broken_weights, max_sequences=2) as llm:
        with pytest.raises(GenerationError) as caught:
            llm.generate([[1, 2]], SamplingParams(max_tokens=2))
        assert both(broken_weights) in str(caught.value)
        assert both(broken_weights) in llm.engine.status().broken
