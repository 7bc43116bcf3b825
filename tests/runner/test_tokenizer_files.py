"""The C++ tokenizer takes files as people have them, refuses those that it does not support, and
survives all others."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import mutate_json
from tokenizer_reference import FIXED, assert_same, make_spec, random_text, run_cli, save
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the value at `path`."""

    def change(spec: Any) -> None:
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value

    return change


def sequence(items: str, *steps: Any) -> dict[str, Any]:
    """A Sequence whose `steps` are under the key `items`."""
    return {"type": "Sequence", items: list(steps)}


def template(*single: dict[str, Any]) -> dict[str, Any]:
    """A TemplateProcessing; without arguments it is the one that adds nothing."""
    pieces = list(single) or [TEXT_PIECE]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pair,
        "special_tokens": special if SPECIAL_PIECE in pieces else {},
    }


NFC = {"type": "NFC"}
TEXT_PIECE = {"Sequence": {"id": "A", "type_id": 0}}
SPECIAL_PIECE = {"SpecialToken": {"id": "<s>", "type_id": 0}}
OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
BYTE_LEVEL_ALONE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = ("pre_tokenizer", "pretokenizers", 0)
BYTE_LEVEL = ("pre_tokenizer", "pretokenizers", 1)
REGEX = (*SPLIT, "pattern", "Regex")
REFUSED = {
    "version": put("version", value="2.0"),
    "normalizer.type": put("normalizer", value={"type": "NFKC"}),
    "normalizer: expected an object": put("normalizer", value="NFC"),
    "normalizer.normalizers[1].type": put(
        "normalizer", value=sequence("normalizers", NFC, {"type": "NFKC"})
    ),
    "normalizer.normalizers[0]: expected": put("normalizer", value=sequence("normalizers", None)),
    "decoder.type": put("decoder", "type", value="Metaspace"),
    "decoder: 0 decoders": put("decoder", value=sequence("decoders")),
    "decoder: 2 decoders": put("decoder", value=sequence("decoders", OFFSETS, OFFSETS)),
    "decoder.decoders[0].type": put("decoder", value=sequence("decoders", {"type": "Fuse"})),
    "post_processor.type": put("post_processor", "type", value="RobertaProcessing"),
    'post_processor.single[0]: {"SpecialToken":{"id":"<s>"': put(
        "post_processor", value=template(SPECIAL_PIECE, TEXT_PIECE)
    ),
    "post_processor.processors[1].single[1]": put(
        "post_processor",
        value=sequence("processors", template(), template(TEXT_PIECE, SPECIAL_PIECE)),
    ),
    "post_processor.single: [{": put("post_processor", value=template(TEXT_PIECE, TEXT_PIECE)),
    "post_processor.special_tokens": put(
        "post_processor", value={**template(), "special_tokens": 1}
    ),
    '"surprise"': put("surprise", value=None),
    "pre_tokenizer.type": put("pre_tokenizer", "type", value="Whitespace"),
    "pre_tokenizer: 0 pretokenizers": put("pre_tokenizer", "pretokenizers", value=[]),
    "pre_tokenizer.add_prefix_space": put(
        "pre_tokenizer", value={**BYTE_LEVEL_ALONE, "add_prefix_space": True}
    ),
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
    "added_tokens[1].id: 1, expected 2000 to": put("added_tokens", 1, "id", value=1),
    "added_tokens[1].id: -1 is no id": put("added_tokens", 1, "id", value=-1),
    "added_tokens[1].id: 1e+300 is no id": put("added_tokens", 1, "id", value=1e300),
    "added_tokens[3].id: 2001 is used twice": put("added_tokens", 3, "id", value=2001),
    "added_tokens[0].id: 221, expected 220": put("added_tokens", 0, "id", value=221),
    "added_tokens[2].id": put("added_tokens", 2, "id", value=1 << 40),
    "added_tokens[1].content": put("added_tokens", 1, "content", value=""),
    "added_tokens[4].content": put("added_tokens", 4, "content", value="<|im_end|>"),
    "added_tokens: ids": put("added_tokens", -1, "content", value="caf\u00e9"),
    "JSON nested too deeply": put("normalizer", value=json.loads("[" * 400 + "]" * 400)),
}


def reverse_added_tokens(spec: dict[str, Any]) -> None:
    spec["added_tokens"].reverse()


def wrap(key: str, items: str) -> Callable[[dict[str, Any]], None]:
    """A change that puts a component into a Sequence in a Sequence."""

    def change(spec: dict[str, Any]) -> None:
        spec[key] = sequence(items, sequence(items, spec[key]))

    return change


PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
ACCEPTED = {
    "padding": put("padding", value=PADDING),
    "truncation": put("truncation", value=TRUNCATION),
    "template": put("post_processor", value=template()),
    "no post-processor": put("post_processor", value=None),
    "sequence of post-processors": put(
        "post_processor", value=sequence("processors", OFFSETS, template())
    ),
    "sequence of decoders": wrap("decoder", "decoders"),
    "sequence of normalizers": wrap("normalizer", "normalizers"),
    "no normalizers": put("normalizer", value=sequence("normalizers")),
    "sequence of pre-tokenizers": wrap("pre_tokenizer", "pretokenizers"),
    "GPT-2's pre-tokenizer": put("pre_tokenizer", value=BYTE_LEVEL_ALONE),
    "GPT-2's pre-tokenizer in a sequence": put(
        "pre_tokenizer", value=sequence("pretokenizers", {**BYTE_LEVEL_ALONE, "use_regex": True})
    ),
    "no split": put("pre_tokenizer", value={**BYTE_LEVEL_ALONE, "use_regex": False}),
    "added tokens out of order": reverse_added_tokens,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(build_dir: Path, tmp_path: Path, name: str) -> None:
    """Files as people have them give the ids that Hugging Face's library gives."""
    spec = make_spec("qwen3_5")
    ACCEPTED[name](spec)
    path = save(spec, tmp_path / "tokenizer.json")
    spec["added_tokens"].sort(key=lambda token: token["id"])  # the library goes by their order
    reference = Tokenizer.from_str(json.dumps(spec))
    reference.no_padding()
    reference.no_truncation()
    rng = random.Random(9)
    texts = [random_text(rng, rng.randint(1, 12)) for _ in range(500)] + FIXED
    encodings = reference.encode_batch(texts)  # including what a post-processor adds
    actual = run_cli(build_dir, path, "--encode", lines=map(json.dumps, texts))
    assert_same(texts, actual, [encoding.ids for encoding in encodings])
    decoded = run_cli(build_dir, path, "--decode", lines=map(json.dumps, actual))
    assert_same(
        texts, decoded, [reference.decode(ids, skip_special_tokens=False) for ids in actual]
    )


def load_pretrained(folder: Path, spec: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that transformers has for Qwen's models, from `spec` or, if that has no
    model, from vocab.json and merges.txt."""
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    if "model" in spec:
        save(spec, folder / "tokenizer.json")
    else:
        config["added_tokens_decoder"] = {str(t.pop("id")): t for t in spec["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def assert_same_as_transformers(
    build_dir: Path, path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rng = random.Random(10)
    texts = [random_text(rng, rng.randint(1, 12)) for _ in range(200)] + FIXED
    actual = run_cli(build_dir, path, "--encode", lines=map(json.dumps, texts))
    assert_same(texts, actual, tokenizer(texts).input_ids)


def test_saved_after_training(build_dir: Path, tmp_path: Path) -> None:
    """What was set for training stays in a file that transformers saves."""
    tokenizer = load_pretrained(tmp_path, make_spec("qwen2"))
    tokenizer(["a b c", "d"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    spec = json.loads(path.read_text())
    assert spec["padding"] and spec["truncation"]
    assert_same_as_transformers(build_dir, path, tokenizer)


def test_saved_from_vocabulary_and_merges(build_dir: Path, tmp_path: Path) -> None:
    """Such a file has a template that adds nothing."""
    spec = make_spec("qwen2")
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in spec.pop("model")["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    tokenizer = load_pretrained(tmp_path, spec)
    tokenizer.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    assert json.loads(path.read_text())["post_processor"]["type"] == "TemplateProcessing"
    assert_same_as_transformers(build_dir, path, tokenizer)


def test_added_tokens_out_of_order(build_dir: Path, tmp_path: Path) -> None:
    """The ids that the file gives are those that a model was trained with."""
    spec = make_spec("qwen2")
    reverse_added_tokens(spec)
    tokenizer = load_pretrained(tmp_path, spec)
    assert_same_as_transformers(build_dir, tmp_path / "tokenizer.json", tokenizer)


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
