"""The C++ tokenizer refuses files that it does not support, and survives all others."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import mutate_json
from tokenizer_reference import make_spec, run_cli, save
from tokenizers.pre_tokenizers import ByteLevel


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the value at `path`."""

    def change(spec: Any) -> None:
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value

    return change


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
BYTE_LEVEL = ("pre_tokenizer", "pretokenizers", 1)
REGEX = (*SPLIT, "pattern", "Regex")
REFUSED = {
    "version": put("version", value="2.0"),
    "truncation": put("truncation", value={"max_length": 3}),
    "padding": put("padding", value={"strategy": "BatchLongest"}),
    "normalizer": put("normalizer", value={"type": "NFKC"}),
    "decoder.type": put("decoder", "type", value="Metaspace"),
    "post_processor.type": put("post_processor", "type", value="TemplateProcessing"),
    '"surprise"': put("surprise", value=None),
    "pre_tokenizer.type": put("pre_tokenizer", "type", value="Whitespace"),
    "pretokenizers": put("pre_tokenizer", "pretokenizers", value=[]),
    "pretokenizers[0].behavior": put(*SPLIT, "behavior", value="Removed"),
    "pretokenizers[0].invert": put(*SPLIT, "invert", value=True),
    "pretokenizers[0].pattern": put(*SPLIT, "pattern", value={"String": " "}),
    "pretokenizers[0].pattern.Regex: invalid": put(*REGEX, value="(a"),
    "pretokenizers[0].pattern.Regex: regular expression uses": put(*REGEX, value=r"\h+|."),
    "pretokenizers[0].pattern.Regex: regular expression can": put(*REGEX, value="a*|b"),
    "pretokenizers[1].use_regex": put(*BYTE_LEVEL, "use_regex", value=True),
    "pretokenizers[1].add_prefix_space": put(*BYTE_LEVEL, "add_prefix_space", value=True),
    "model.type": put("model", "type", value="Unigram"),
    "model.dropout": put("model", "dropout", value=0.1),
    "model.unk_token": put("model", "unk_token", value="a"),
    "model.continuing_subword_prefix": put("model", "continuing_subword_prefix", value="##"),
    "model.end_of_word_suffix": put("model", "end_of_word_suffix", value="</w>"),
    "model.fuse_unk": put("model", "fuse_unk", value=True),
    "model.byte_fallback": put("model", "byte_fallback", value=True),
    "model.ignore_merges": put("model", "ignore_merges", value=1),
    'model.vocab."a": -1': put("model", "vocab", "a", value=-1),
    'model.vocab."a": 4294967296': put("model", "vocab", "a", value=1 << 32),
    'model.vocab."a": 1e+30': put("model", "vocab", "a", value=1e30),
    "id 5 is used twice": lambda spec: spec["model"]["vocab"].update(a=5, b=5),
    "model.vocab: no token for byte 0": lambda spec: spec.update(
        model={**spec["model"], "vocab": {"b": 0}, "merges": []}, added_tokens=[]
    ),
    "model.merges[7]": put("model", "merges", 7, value=["a", "no such token"]),
    "model.merges[8]": put("model", "merges", 8, value="a b c"),
    "model.merges[9]": put("model", "merges", 9, value=["a"]),
    'model.merges[10]: "qz"': put("model", "merges", 10, value=["q", "z"]),
    "added_tokens[1].lstrip": put("added_tokens", 1, "lstrip", value=1),
    "added_tokens[1].rstrip": put("added_tokens", 1, "rstrip", value=1),
    "added_tokens[1].single_word": put("added_tokens", 1, "single_word", value=1),
    "added_tokens[1].id": put("added_tokens", 1, "id", value=1),
    "added_tokens[2].id": put("added_tokens", 2, "id", value=1 << 40),
    "added_tokens[1].content": put("added_tokens", 1, "content", value=""),
    "added_tokens[4].content": put("added_tokens", 4, "content", value="<|im_end|>"),
    "added_tokens: ids": put("added_tokens", -1, "content", value="caf\u00e9"),
    "JSON nested too deeply": put("normalizer", value=json.loads("[" * 400 + "]" * 400)),
}


def test_refused(build_dir: Path, tmp_path: Path) -> None:
    """What is not supported is refused with an error that names file and key."""
    original = make_spec("qwen3_5")
    paths = []
    for i, change in enumerate(REFUSED.values()):
        spec = copy.deepcopy(original)
        change(spec)
        paths.append(save(spec, tmp_path / f"{i}.json"))
    paths += [tmp_path / "missing.json", tmp_path]
    keys = [*REFUSED, "file: not found", "file: not found"]
    errors = run_cli(build_dir, "--check", lines=map(str, paths))
    for path, key, error in zip(paths, keys, errors, strict=True):
        assert error is not None, f"{key}: accepted"
        assert error.startswith(f"{path}: ") and key in error, f"{key}: {error}"


def test_mutated_files(build_dir: Path, tmp_path: Path) -> None:
    """A damaged file can be used, or gives an error message; the process never dies."""
    rng = random.Random(6)
    spec = make_spec("qwen3_5")
    spec["model"]["merges"] = spec["model"]["merges"][:20]
    tokens = {token for pair in spec["model"]["merges"] for token in [*pair, "".join(pair)]}
    tokens |= set(ByteLevel.alphabet())
    spec["model"]["vocab"] = {token: i for i, token in enumerate(sorted(tokens))}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in tokens]
    for i, token in enumerate(spec["added_tokens"]):
        token["id"] = len(tokens) + i
    original = save(spec, tmp_path / "original.json").read_bytes()

    paths = [tmp_path / "original.json"]
    for i in range(2500):
        data = bytearray(original)
        if i % 5 == 0:
            del data[rng.randrange(len(data)) :]
        elif i % 5 == 1:
            data = bytearray(json.dumps(mutate_json(rng, spec)).encode())
        else:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_bytes(data)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 5_000_000)
    errors = run_cli(build_dir, "--check", lines=map(str, [*paths, deep]))
    assert len(errors) == len(paths) + 1 and errors[0] is None
    messages = [(path, error) for path, error in zip([*paths, deep], errors, strict=True) if error]
    assert len(messages) > 1500
    for path, error in messages:
        assert error.startswith(f"{path}: ") and len(error) < 2000
