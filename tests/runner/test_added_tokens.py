"""Added tokens are found where Hugging Face's tokenizers finds them, and fast."""

import json
import random
import re
from pathlib import Path

import pytest
from tokenizer_fuzzer import random_texts, random_tokens
from tokenizer_reference import (
    CODE_POINTS,
    assert_same,
    bytes_spec,
    in_contexts,
    run_cli,
    save,
    start_cli,
)
from tokenizers import AddedToken, Tokenizer


def assert_same_ids(
    build_dir: Path, cases: list[tuple[Path, list[str]]], parse_special: bool = True
) -> None:
    """Checks that files and texts give the ids that Hugging Face's library gives."""
    requests = [
        {"path": str(path), "texts": texts, "parse_special": parse_special} for path, texts in cases
    ]
    answers = run_cli(build_dir, "--try", lines=map(json.dumps, requests))
    for (path, texts), answer in zip(cases, answers, strict=True):
        reference = Tokenizer.from_file(str(path))
        reference.encode_special_tokens = not parse_special
        encodings = reference.encode_batch(texts, add_special_tokens=False)
        assert "results" in answer, (path, answer)
        assert_same(texts, [r["ids"] for r in answer["results"]], [e.ids for e in encodings])


@pytest.mark.parametrize("parse_special", [True, False])
def test_random_sets(build_dir: Path, tmp_path: Path, parse_special: bool) -> None:
    rng = random.Random(7)
    cases = []
    for i in range(400):
        tokens = random_tokens(rng)
        texts = random_texts(rng, [token.content for token in tokens], 50)
        cases.append((save(bytes_spec(tokens), tmp_path / f"{i}.json"), texts))
    assert_same_ids(build_dir, cases, parse_special)


def test_every_code_point_beside_a_token(build_dir: Path, tmp_path: Path) -> None:
    """This shows which characters are part of a word, and which are white space."""
    tokens = [
        AddedToken("<w>", single_word=True, normalized=False),
        AddedToken("<s>", lstrip=True, rstrip=True, normalized=False),
    ]
    texts = in_contexts("-{0}<w>-<w>{0}-{0}<s>{0}", CODE_POINTS)
    assert_same_ids(build_dir, [(save(bytes_spec(tokens), tmp_path / "t.json"), texts)])


def seconds(build_dir: Path, path: Path, text: str, ids: list[int]) -> tuple[float, float]:
    """Processor time that loading a file and encoding a text take; the text must give `ids`."""
    done = start_cli(build_dir, path, "--encode", lines=[json.dumps(text)])
    assert json.loads(done.stdout) == ids
    load, convert = re.fullmatch(r"load (\S+) s, convert (\S+) s\n", done.stderr).groups()
    return float(load), float(convert)


def test_many_tokens_and_a_long_text(build_dir: Path, tmp_path: Path) -> None:
    """100,000 tokens load in a second, and a text of 1 MB is cut in one."""
    tokens = [
        AddedToken(f"<|token_{i}|>", special=i % 2 == 0, normalized=i % 3 == 0)
        for i in range(100_000)
    ]
    spec = bytes_spec(tokens)
    path = save(spec, tmp_path / "many.json")
    rng = random.Random(8)
    chosen = [rng.randrange(len(tokens)) for _ in range(50_000)]
    text = "".join(f"<|token_{i}|>..<|token_" for i in chosen)
    assert len(text) > 1_000_000
    ids = Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
    assert sum(i >= 256 for i in ids) == len(chosen)
    load, convert = seconds(build_dir, path, text, ids)
    assert load < 1 and convert < 1, (load, convert)


def test_long_tokens(build_dir: Path, tmp_path: Path) -> None:
    """Tokens that nearly match, and white space at every token, take no quadratic time."""
    n = 1 << 20
    tokens = [AddedToken(t, normalized=False) for t in ("a", "a" * (n // 2) + "b", "b" + "a" * n)]
    tokens += [AddedToken(t, normalized=False, lstrip=True, rstrip=True) for t in ("\n", "\t ")]
    path = save(bytes_spec(tokens), tmp_path / "long.json")
    a, end_of_line, tab = (
        Tokenizer.from_file(str(path)).token_to_id(t) for t in ("a", "\n", "\t ")
    )
    for text, ids in (
        ("a" * n, [a] * n),
        (" \n" * (n // 2) + "\t  ", [end_of_line] * (n // 2) + [tab]),
    ):
        load, convert = seconds(build_dir, path, text, ids)
        assert load < 1 and convert < 1, (load, convert)
