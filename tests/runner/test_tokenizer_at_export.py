"""Export refuses the tokenizers that the runner would refuse, and takes those that it takes."""

import json
import re
from pathlib import Path

import pytest
from test_tokenizer_files import ACCEPTED, REFUSED
from tokenizer_reference import make_spec, run_cli, save

from et_moe.pipeline.config import ConfigError, ConfigWarning
from et_moe.pipeline.tokenizer import SCHEMAS, byte_alphabet, check_tokenizer

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original() -> str:
    return json.dumps(make_spec("qwen3_5"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, original: str, name: str) -> None:
    spec = json.loads(original)
    REFUSED[name](spec)
    path = save(spec, tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"^" + re.escape(f"{path}: ")) as caught:
        check_tokenizer(tmp_path)
    # A case's name begins with the key that the runner names, or with another part of its message.
    key = name.split(":")[0]
    if re.fullmatch(r'[\w.]+(\[\d+\][\w.]*)*(\."a")?', key) and "ids" not in name:
        assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(tmp_path: Path, original: str, name: str) -> None:
    spec = json.loads(original)
    ACCEPTED[name](spec)
    save(spec, tmp_path / "tokenizer.json")
    check_tokenizer(tmp_path)


@pytest.mark.parametrize("variant", ["qwen2", "no normalizer", "legacy merges", "ignore_merges"])
def test_variants(build_dir: Path, tmp_path: Path, variant: str) -> None:
    path = save(make_spec(variant), tmp_path / "tokenizer.json")
    check_tokenizer(tmp_path)
    assert run_cli(build_dir, path, "--encode", lines=['"text"'])


def test_the_demo_checkpoint() -> None:
    check_tokenizer(REPO / "examples/qwen3_5_moe/demo_checkpoint")


def test_none(tmp_path: Path) -> None:
    with pytest.warns(ConfigWarning, match="no tokenizer.json: the program takes and gives token"):
        check_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"[]", r"tokenizer\.json: expected an object"),
        (b"\xff", "not readable"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(tmp_path)


def test_the_rules_are_those_of_the_runner() -> None:
    source = (REPO / "runner/tokenizer/tokenizer_json.cpp").read_text()
    schemas = re.search(r'parse_json\(R"\((\{.*?\})\)"\)', source, re.DOTALL)
    assert json.loads(schemas[1]) == SCHEMAS


def test_the_alphabet_is_that_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_alphabet()) == sorted(ByteLevel.alphabet())
    assert byte_alphabet()[ord("a")] == "a" and byte_alphabet()[ord(" ")] == "Ġ"
