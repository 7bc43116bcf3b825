"""The C++ tokenizer gives what Hugging Face's tokenizers gives."""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizer_reference import (
    CODE_POINTS,
    FIXED,
    PATTERNS,
    assert_same,
    in_contexts,
    make_spec,
    random_text,
    run_cli,
    save,
)
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

VARIANTS = ["qwen3_5", "qwen2", "no normalizer", "legacy merges", "ignore_merges"]
VARIANTS += ["shuffled merges"]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the path of the tokenizer.json of a variant."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def path_of(variant: str) -> Path:
        path = folder / f"{variant}.json"
        return path if path.exists() else save(make_spec(variant), path)

    return path_of


def assert_same_ids(
    build_dir: Path, path: Path, texts: list[str], parse_special: bool = True
) -> None:
    reference = Tokenizer.from_file(str(path))
    reference.encode_special_tokens = not parse_special
    expected = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
    mode = "--encode" if parse_special else "--encode-plain"
    assert_same(texts, run_cli(build_dir, path, mode, lines=map(json.dumps, texts)), expected)


@pytest.mark.parametrize("parse_special", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_random_texts(build_dir, tokenizer_path, variant: str, parse_special: bool) -> None:
    rng = random.Random(2)
    texts = [random_text(rng, rng.randint(0, 12)) for _ in range(2500)]
    assert_same_ids(build_dir, tokenizer_path(variant), texts + FIXED, parse_special)


def assert_same_pieces(build_dir: Path, pattern: str, texts: list[str]) -> None:
    reference = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    expected = [[piece for piece, _ in reference.pre_tokenize_str(text)] for text in texts]
    actual = run_cli(build_dir, pattern, "--split", lines=map(json.dumps, texts))
    assert_same(texts, actual, expected)


# This pattern has other syntax that is supported, and leaves gaps between its matches.
OTHER_PATTERN = (
    r"\p{N}{1,3}|(?:\p{L}+?|[\p{M}'x])++|\s+(?=\S)|([^\S\r\n\t]*+)\p{M}|[^\s\p{L}\p{N}]{2,}"
)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), OTHER_PATTERN])
def test_split_random_texts(build_dir, pattern: str) -> None:
    """The pieces are compared, since ids alone would not show them."""
    rng = random.Random(2)
    texts = [random_text(rng, rng.randint(1, 12)) for _ in range(2500)]
    assert_same_pieces(build_dir, pattern, texts)


def test_split_every_code_point(build_dir) -> None:
    """It stands next to letters, digits, spaces, punctuation, contractions and marks."""
    context = "a{0}1 {0} {0}{0}.{0}\n{0}  {0}'{0}'l{0}\u0301{0}'s{0}"
    assert_same_pieces(build_dir, PATTERNS["qwen3_5"], in_contexts(context, CODE_POINTS))


def test_normalize(build_dir) -> None:
    """NFC is right for random texts, for every code point next to Hangul jamo and marks of all
    classes, for all decompositions, and for marks in random order."""
    rng = random.Random(3)
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    texts = [random_text(rng, rng.randint(1, 12)) for _ in range(2500)]
    texts += in_contexts(
        "a{0}\u0301e{0}\u0334{0}\u0345{0}\u05b0\U00016ff0\u0301\uac00{0}\u1100{0}\u1161{0}",
        CODE_POINTS,
    )
    texts += in_contexts("{0}", CODE_POINTS)
    decompositions = [nfd(chr(c)) for c in CODE_POINTS if nfd(chr(c)) != chr(c)]
    assert len(decompositions) > 13000
    texts += decompositions
    rng.shuffle(decompositions)
    texts += ["".join(decompositions[i : i + 50]) for i in range(0, len(decompositions), 50)]

    marks = [
        c
        for c in map(chr, CODE_POINTS)
        if unicodedata.combining(c) or nfd(f"\u0345{c}\u0334")[-1] != "\u0334"
    ]
    assert len(marks) > 800
    bases = ["a", "\u00e9", "\u03b1", "\u0928", "\u1100", "\uac00", "\uac01", "\u0dd9"]
    for _ in range(4000):
        texts.append(rng.choice(bases) + "".join(rng.choices(marks, k=rng.randint(1, 8))))
    actual = run_cli(build_dir, "--normalize", lines=map(json.dumps, texts))
    assert_same(texts, actual, list(map(nfc, texts)))


def test_encode_megabytes(build_dir, tokenizer_path) -> None:
    """Long words and runs must hit no limit and take no quadratic time."""
    n = 1 << 20
    rng = random.Random(4)
    texts = ["a" * n, " " * n, "\n" * n, " \n" * (n // 2), " " * n + "x", "\u3000" * n, "." * n]
    texts += ["漢字" * (n // 4), "e\u0301" * (n // 2), "1" * n, "ab" * n, "'s" * (n // 2)]
    texts += ["a" + "\u0345\u0301\u0334" * (n // 8), "<|im_end|>" * (n // 16), "<" * n]
    texts += ["".join(rng.choices("abcdefgh", k=n)), random_text(rng, n // 16)]
    assert_same_ids(build_dir, tokenizer_path("qwen3_5"), texts)


def test_decode(build_dir, tokenizer_path) -> None:
    path = tokenizer_path("qwen3_5")
    reference = Tokenizer.from_file(str(path))
    rng = random.Random(5)
    size = reference.get_vocab_size()
    lists = [[rng.randrange(size) for _ in range(rng.randint(0, 40))] for _ in range(2000)]
    lists += [[rng.randrange(256) for _ in range(20)] for _ in range(1000)]  # bytes: bad UTF-8
    lists += [[i] for i in range(size)]
    expected = [reference.decode(ids, skip_special_tokens=False) for ids in lists]
    assert run_cli(build_dir, path, "--decode", lines=map(json.dumps, lists)) == expected
