"""The runner refuses bad input: a message that says what and where, no signal, no output file."""

import json
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import make_small, spec_of, storages

from et_moe.backends.cpu import lowering
from et_moe.backends.method_graph import MethodGraph
from et_moe.backends.sealed_file import PtdWriter, write_sealed
from et_moe.examples.qwen3_5_moe.tokenizer import tokenizer_json
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.quantize import (
    QuantizedCheckpoint,
    WeightSource,
    parameter_groups,
)
from et_moe.pipeline.storage import Storage

CONTEXT, VOCABULARY = 32, 264


def test_a_good_run_writes_its_files(runner, tiny_program: Path, tmp_path: Path) -> None:
    """The refusals below are compared with this run, which uses the whole context."""
    prompt = ",".join(["7"] * (CONTEXT - 1))
    ids, stats = tmp_path / "ids.json", tmp_path / "stats.json"
    runner.run(
        tiny_program, f"--prompt_ids={prompt}", f"--output_ids_path={ids}", f"--stats_path={stats}"
    )
    assert len(json.loads(ids.read_text())) == 1
    assert json.loads(stats.read_text())["prompt_tokens"] == CONTEXT - 1
    scored = runner.score(tiny_program, [7] * (CONTEXT + 1))
    assert len(scored) == CONTEXT


FILE_FLAGS = ["model_path", "data_path", "tokenizer_path"]
NAMES = {
    "model_path": "model.pte",
    "data_path": "model.ptd",
    "tokenizer_path": "tokenizer.json",
}


@pytest.mark.parametrize("flag", FILE_FLAGS)
def test_files_that_are_missing_or_no_files(refused, tmp_path: Path, flag: str) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path in (tmp_path / "missing", tmp_path, empty, Path("/dev/null")):
        refused("--prompt_ids=1", parts=[f"error: {path}: "], **{flag: path})


@pytest.mark.parametrize("flag", FILE_FLAGS)
def test_files_that_are_cut_short_or_too_long(refused, tiny_program, tmp_path, flag: str) -> None:
    whole = (tiny_program / NAMES[flag]).read_bytes()
    path = tmp_path / "damaged"
    size = len(whole)
    for kept in (1, 7, 23, 24, 25, 100, size // 3, size // 2, size - 25, size - 24, size - 1):
        path.write_bytes(whole[:kept])
        if flag == "tokenizer_path" and kept == size - 1:  # only a newline is missing
            continue
        refused("--prompt_ids=1", parts=[f"error: {path}: "], **{flag: path})
    path.write_bytes(whole + b"x")
    refused("--prompt_ids=1", parts=[f"error: {path}: "], **{flag: path})


@pytest.mark.parametrize("flag", ["model_path", "data_path"])
def test_flipped_bits(refused, tiny_program: Path, tmp_path: Path, flag: str) -> None:
    """A bit is flipped in the header, in the middle or in the trailer."""
    whole = (tiny_program / NAMES[flag]).read_bytes()
    path = tmp_path / "damaged"
    for position in (0, 4, 9, 100, len(whole) - 24, len(whole) - 16, len(whole) - 8, -1):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        refused("--prompt_ids=1", parts=[f"error: {path}: ", "et-moe export"], **{flag: path})


def test_a_flipped_bit_of_a_weight_names_the_tensor(refused, tiny_bundle, tiny_program, tmp_path):
    whole = (tiny_program / "model.ptd").read_bytes()
    path = tmp_path / "damaged"
    for group in Bundle(tiny_bundle).groups():
        for name, tensor in group.items():
            if name.endswith(("w13", "in_proj.weight", "embed_tokens.weight")):
                content = tensor.numpy().tobytes()
                changed = bytearray(whole)
                changed[whole.index(content) + len(content) // 2] ^= 1
                path.write_bytes(changed)
                parts = [f"error: {path}: damaged: checksum mismatch of tensor {name}\n"]
                refused("--prompt_ids=1", parts=parts, data_path=path)


def test_files_of_another_kind(refused, tiny_program: Path, tiny_bundle: Path) -> None:
    pte, ptd = tiny_program / "model.pte", tiny_program / "model.ptd"
    tokenizer = tiny_program / "tokenizer.json"
    shard = tiny_bundle / "model-00001-of-00004.safetensors"
    for path in (ptd, tokenizer, shard):
        refused("--prompt_ids=1", parts=[f"error: {path}: "], model_path=path)
    for path in (pte, tokenizer, shard):
        refused("--prompt_ids=1", parts=[f"error: {path}: "], data_path=path)
    for path in (pte, ptd, tiny_bundle / "config.json"):
        refused("--prompt_ids=1", parts=[f"error: {path}: "], tokenizer_path=path)


def test_a_sealed_file_of_something_else(refused, tmp_path: Path) -> None:
    path = tmp_path / "sealed"
    write_sealed(path, b"neither a program nor weights" * 100)
    refused("--prompt_ids=1", parts=[f"error: {path}: not an ExecuTorch program"], model_path=path)
    refused("--prompt_ids=1", parts=[f"error: {path}: not a FlatTensor"], data_path=path)


def test_another_format_version(refused, tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    graph = MethodGraph(program=program, inputs=["x"], outputs=["y"])
    graphs = {"prefill": graph, "decode": graph}
    path = tmp_path / "model.pte"
    for constants, message in (
        (
            {"get_format_version": 1},
            "format version 1, this runner reads version 5: export it again",
        ),
        ({"get_format_version": "1"}, "get_format_version is not a count"),
        ({}, "has no method get_format_version"),
    ):
        write_sealed(path, lowering.lower(graphs, constants).pte)
        refused("--prompt_ids=1", parts=[f"error: {path}: {message}"], model_path=path)


def write_ptd(source: WeightSource, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The `.ptd` that an export of `source` would write."""
    spec = spec_of(source, dtype)
    with PtdWriter(path, spec) as writer:
        for names, group in zip(parameter_groups(spec), source.groups(), strict=True):
            for name in names:
                writer.write(name, group[name].to(spec[name][0]))
    return path


def test_weights_of_another_model(refused, tiny_program, tiny_bundle, tmp_path: Path) -> None:
    def other(quantization: dict[str, Storage], **overrides) -> WeightSource:
        directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        make_small(directory, **overrides)
        return QuantizedCheckpoint(Checkpoint(directory), quantization)

    same = storages("4w", 32, "8w")
    path = tmp_path / "other.ptd"
    pte = tiny_program / "model.pte"
    both = f"error: {pte} with {path}: they do not fit each other: the weights have"
    for source, message in (
        (other(same, vocab_size=272), "embed_tokens.weight as Char [272, 32], the program takes"),
        (other(same, num_experts=5), "layers.0.mlp.gate.weight as Float [6, 32], the program"),
        (other(storages("none", 32, "8w")), "layers.0.linear_attn.in_proj.weight as Float ["),
        (other(storages("4w", 32, "none")), "embed_tokens.weight as Float [264, 32], the "),
        (other(same, layer_types=["linear_attention"]), "no tensor layers.1.input_layernorm"),
    ):
        write_ptd(source, path)
        refused("--prompt_ids=1", parts=[f"{both} {message}"], data_path=path)
    write_ptd(Bundle(tiny_bundle), path, torch.bfloat16)
    message = "layers.0.input_layernorm.weight as BFloat16 [32], the program takes Float"
    refused("--prompt_ids=1", parts=[f"{both} {message}"], data_path=path)


def test_weights_of_another_group_size(refused, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "linear_value_head_dim": 16, "moe_intermediate_size": 64}
    make_small(tmp_path / "c", **wide)
    checkpoint = Checkpoint(tmp_path / "c")
    export(
        QuantizedCheckpoint(checkpoint, storages("4w", 64)),
        tmp_path / "program",
        ExportOptions(max_seq_len=CONTEXT),
    )
    other = write_ptd(QuantizedCheckpoint(checkpoint, storages("4w", 32)), tmp_path / "other.ptd")
    pte = tmp_path / "program/model.pte"
    parts = [
        f"error: {pte} with {other}: they do not fit each other: the weights have layers.0.linear_"
        "attn.in_proj.scale as BFloat16 [168, 2], the program takes BFloat16 [168, 1]"
    ]
    refused("--prompt_ids=1", parts=parts, model_path=pte, data_path=other)


def test_prompts_that_do_not_fit(refused, tiny_program: Path, tmp_path: Path) -> None:
    tokenizer = f"--tokenizer_path={tiny_program / 'tokenizer.json'}"
    for length in (CONTEXT, CONTEXT + 1, 1000):
        message = f"the prompt has {length} tokens, the context of the program holds {CONTEXT}"
        refused(f"--prompt_ids={','.join(['1'] * length)}", parts=[message])
        refused(tokenizer, f"--prompt={'a' * length}", parts=[message])
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([1] * (CONTEXT + 2)))
    flags = (f"--score_ids_path={ids}", f"--logprobs_path={tmp_path / 'output' / 'l'}")
    refused(*flags, parts=[f"{CONTEXT + 2} tokens do not fit the context of {CONTEXT}"])


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**31, 2**63 - 1, -(2**63)])
def test_token_ids_out_of_range(refused, tmp_path: Path, token: int) -> None:
    message = f"token id {token} is outside the vocabulary of {VOCABULARY}"
    ids, output = tmp_path / "ids.json", tmp_path / "output"
    for prompt in ([token], [1, 2, token], [token, 1, 2], [1, token, 2]):
        refused(f"--prompt_ids={','.join(map(str, prompt))}", parts=[message])
        if len(prompt) > 1:
            ids.write_text(json.dumps(prompt))
            for kind in ("logprobs", "logits"):
                flags = (f"--score_ids_path={ids}", f"--{kind}_path={output / kind}")
                refused(*flags, parts=[message])


@pytest.mark.parametrize(
    "text", ["1,,2", ",1", "1,", "1,2,", ",", "x", "1,x", "1 2", "1.5", "1e3", "[1]", "9" * 20]
)
def test_prompt_ids_that_are_no_ids(refused, text: str) -> None:
    refused(f"--prompt_ids={text}", parts=["--prompt_ids: ", "is not a token id"])


def test_a_tokenizer_of_another_model(refused, tiny_program: Path, tmp_path: Path) -> None:
    """Its ids may be beyond the program's vocabulary."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json([(c, c) for c in "abcdefghij"])))
    both = f"{tiny_program / 'model.pte'} with {path}"
    message = f"{both}: token id 268 is outside the vocabulary of {VOCABULARY}"
    text, prompts = "x<|im_end|>", tmp_path / "prompts"
    refused(f"--prompt={text}", parts=[f"error: --prompt: {message}"], tokenizer_path=path)
    prompts.write_text(json.dumps({"prompt": text}))
    parts = [f"error: {prompts}:1: prompt: {message}"]
    refused(f"--prompts_path={prompts}", parts=parts, tokenizer_path=path)


def test_empty_prompts(refused, tiny_program: Path, tmp_path: Path) -> None:
    tokenizer = tiny_program / "tokenizer.json"
    empty = tmp_path / "empty"
    empty.touch()
    refused("--prompt_ids", "", parts=["the prompt is empty"], tokenizer_path=tokenizer)
    for flag, value in (("--prompt", ""), ("--prompt_file", str(empty))):
        message = f"error: {value or flag}: the prompt is empty\n"
        refused(flag, value, parts=[message], tokenizer_path=tokenizer)
    ids, logprobs = tmp_path / "ids.json", f"--logprobs_path={tmp_path / 'output' / 'l'}"
    for text in ("[]", "[5]"):
        ids.write_text(text)
        message = "scoring needs at least two token ids"
        refused(f"--score_ids_path={ids}", logprobs, parts=[message])
    for flag in ("--prompt_ids", "--score_ids_path"):
        refused(f"{flag}=", parts=[f"{flag}: 1 required TEXT missing"], tokenizer_path=tokenizer)


def test_prompts_that_cannot_be_read(refused, tiny_program: Path, tmp_path: Path) -> None:
    tokenizer = tiny_program / "tokenizer.json"
    missing, latin = tmp_path / "missing", tmp_path / "latin"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    for flag in ("prompt_file", "score_ids_path"):
        flags = ("--logprobs_path=x",) if flag == "score_ids_path" else ()
        for path in (missing, tmp_path):
            parts = [f"error: {path}: "]
            refused(f"--{flag}={path}", *flags, parts=parts, tokenizer_path=tokenizer)
    message = "text is not UTF-8 at byte 3"
    for flag, where in ((f"--prompt_file={latin}", latin), ("--prompt=caf\udce9", "--prompt")):
        refused(flag, parts=[f"error: {where}: {message}\n"], tokenizer_path=tokenizer)
    refused("--prompt=hello", parts=["--tokenizer_path is needed to read a text prompt"])


@pytest.mark.parametrize("text", ["", "{}", "[1, 2", "[1.5, 2]", '["1"]', "[null]", "[[1]]", "3"])
def test_id_files_that_are_damaged(refused, tmp_path: Path, text: str) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    flags = (f"--score_ids_path={path}", f"--logprobs_path={tmp_path / 'output' / 'l'}")
    refused(*flags, parts=[f"error: {path}: "])


def test_seeds_are_all_of_int64(runner, tiny_program: Path, tmp_path: Path) -> None:
    """All bits of a seed count, and so does its sign."""
    seeds = (0, 1, 2**32, 2**63 - 1, -1, -(2**63))
    flags = ("--temperature=100", f"--output_ids_path={tmp_path / 'ids'}")
    texts = set()
    for seed in seeds:
        runner.run(tiny_program, "--prompt_ids=1", f"--seed={seed}", *flags)
        texts.add((tmp_path / "ids").read_text())
    assert len(texts) == len(seeds)


def test_too_little_memory(runner, tiny_program: Path, tmp_path: Path) -> None:
    """The file that needs the memory is named; here it is a hole of 4 GiB."""
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(2**32)
    tokenizer = f"--tokenizer_path={tiny_program / 'tokenizer.json'}"
    ids = tmp_path / "ids"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**31, resource.RLIM_INFINITY))

    for flags in (
        (tokenizer, f"--prompt_file={hole}"),
        (f"--prompts_path={hole}", f"--output_ids_path={ids}"),
        (f"--score_ids_path={hole}", f"--logprobs_path={ids}"),  # this is read as it comes
    ):
        command = [runner.binary, f"--model_path={tiny_program / 'model.pte'}"]
        command += [f"--data_path={tiny_program / 'model.ptd'}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
        is_score = flags[0].startswith("--score")
        message = "not a JSON list of token ids: it has a byte 0" if is_score else "out of memory"
        assert (done.returncode, done.stderr) == (1, f"error: {hole}: {message}\n")
    assert list(tmp_path.iterdir()) == [hole]


def test_flags_that_are_missing(refused, runner, tmp_path: Path) -> None:
    refused(parts=["Exactly 1 option from", "--prompt_ids"])
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2]")
    refused(f"--score_ids_path={ids}", parts=["needs --logprobs_path or --logits_path"])
    for flag in ("--output_ids_path", "--stats_path"):
        output = tmp_path / "none"
        flags = (f"--score_ids_path={ids}", f"--logprobs_path={tmp_path / 'l'}")
        refused(*flags, f"{flag}={output}", parts=[f"{flag}: scoring writes none"])
        assert not output.exists()
    for flags, fault in (
        ((), "--model_path is required"),
        (("--model_path=x", "--data_path=y", "--prompt=z", "--top_k=x"), "no decimal integer"),
        (("--model_path=x", "--data_path=y", "--prompt=z", "--foo"), "not expected: --foo"),
    ):
        done = subprocess.run([runner.binary, *flags], capture_output=True, text=True)
        assert done.returncode == 2 and fault in done.stderr and not done.stdout
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    done = subprocess.run([runner.binary, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--prompts_path" in done.stdout and not done.stderr


def test_files_of_another_kind_are_not_called_damaged(
    refused, tiny_program: Path, tmp_path: Path
) -> None:
    """As a text, and each in the other's place."""
    program, weights = tiny_program / "model.pte", tiny_program / "model.ptd"
    for i, content in enumerate((b"Read me. " * 100, b"short", None)):
        file = tmp_path / f"file{i}"
        file.write_bytes(content or b"")
        for flag, kind, other in (
            ("model_path", "an ExecuTorch program (.pte)", weights),
            ("data_path", "a FlatTensor file (.ptd)", program),
        ):
            given = file if content is not None else other
            message = f"{given}: not {kind}, expected one that `et-moe export` wrote"
            refused("--prompt_ids=1", parts=[message], **{flag: given})
