"""Makes tokenizers of Qwen's kind with Hugging Face's library, makes random texts, and runs the
C++ tokenizer."""

import json
import random
import resource
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel
from tokenizers.trainers import BpeTrainer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "qwen3_5": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>"]
PLAIN_TOKENS = ["<think>", "</think>", "<think>\n", "im_end"]
# Contents that are not NFC, or have characters from outside or inside of the byte-level alphabet.
NORMALIZED_TOKENS = ["cafe\u0301", "two words", "Ġ", "\u6f22\u5b57"]

# First and last code points of ranges to draw characters from.
SCRIPTS = {
    "ascii": [(0x20, 0x7E)],
    "latin": [(0xC0, 0x24F), (0x1E00, 0x1EFF), (0x17F, 0x17F), (0x212A, 0x212B)],
    "greek and cyrillic": [(0x370, 0x52F), (0x1F00, 0x1FFF)],
    "hebrew, arabic, syriac": [(0x590, 0x74F)],
    "indic": [(0x900, 0xDFF)],
    "south east asia": [(0xE00, 0x109F), (0x1780, 0x18AF), (0x1A00, 0x1BFF)],
    "hangul": [(0x1100, 0x11FF), (0xA960, 0xA97F), (0xAC00, 0xD7FF)],
    "jamo": [(0x1100, 0x1112), (0x1161, 0x1175), (0x11A7, 0x11C2)],
    "cjk": [(0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x20FFF)],
    "marks": [(0x300, 0x36F), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF)],
    "controls": [(0x00, 0x1F), (0x7F, 0x9F), (0x200B, 0x200F), (0x180B, 0x180F), (0xFEFF, 0xFEFF)],
    "spaces": [(0x9, 0xD), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680)],
    "more spaces": [(0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x3000, 0x3000)],
    "digits": [(0x30, 0x39), (0x660, 0x669), (0x966, 0x96F), (0xBD, 0xBE), (0x2150, 0x218B)],
    "more digits": [(0x1D7CE, 0x1D7FF), (0x1FBF0, 0x1FBF9)],
    "symbols": [(0x2010, 0x2BFF), (0xE000, 0xE010), (0xFE00, 0xFE0F), (0xFFF0, 0xFFFD)],
    "emoji": [(0x1F300, 0x1FAFF), (0x1F1E6, 0x1F1FF)],
    "anything": [(0x0, 0xD7FF), (0xE000, 0x10FFFF)],
}
# Contractions, white space, emoji sequences, Hangul, marks out of order, tokens and parts of them.
FIXED = ["don't", "I'LL", "we'Re", "YOU'VE", "'ſ", "X'ſ", "it'S'", "''d", "'M'm", "caf\u00e9"]
FIXED += ["\r\n", "\n\n\n", " \n ", "   ", "\t\t", "\u3000\u2003", "👍\U0001f3fd"]
FIXED += ["👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "한국어", "\u1100\u1161\u11a8"]
FIXED += [
    "\ub958\u11a7",
    "a\u0345\u0301\u0327",
    "a\u0323\u0307",
    "a\u0307\u0323",
    "\u0958",
    "\u0f73\u0f71",
]
FIXED += ["e\u0301" * 20, "x" * 300, "Ġ Ġ", "<|im_", "im_start|>", "<|im_end|><think>\n\n</think>"]
FIXED += [*SPECIAL_TOKENS, *PLAIN_TOKENS, *NORMALIZED_TOKENS]

# All planes that have assigned characters, and the corners of the others.
CODE_POINTS = [*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200)]
CODE_POINTS += [0xEFFFF, 0xF0000, 0xFFFFD, 0x100000, 0x10FFFF]


def random_text(rng: random.Random, length: int) -> str:
    def fragment() -> str:
        if rng.random() < 0.3:
            return rng.choice(FIXED)
        ranges = SCRIPTS[rng.choice(list(SCRIPTS))]
        return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 8)))

    return "".join(fragment() for _ in range(length))


def add_components(tokenizer: Tokenizer, pattern: str = "qwen3_5", normalize: bool = True) -> None:
    """Gives a tokenizer what Qwen's has around its model."""
    if normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)


@cache
def train(pattern: str = "qwen3_5", normalize: bool = True) -> Tokenizer:
    """A small tokenizer that has the features of Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    add_components(tokenizer, pattern, normalize)
    trainer = BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = [random_text(rng, 30) for _ in range(400)] + [" the cat's  hat aaaa " * 20]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in PLAIN_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in NORMALIZED_TOKENS])
    return tokenizer


def save(spec: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    return path


def make_spec(variant: str) -> dict[str, Any]:
    if variant == "qwen2":
        return json.loads(train(pattern="qwen2").to_str())
    if variant == "no normalizer":
        return json.loads(train(normalize=False).to_str())
    spec = json.loads(train().to_str())
    if variant == "legacy merges":
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
        spec["model"]["continuing_subword_prefix"] = spec["model"]["end_of_word_suffix"] = ""
    if variant == "ignore_merges":
        # Without many of its merges, most words of the vocabulary are found only as a whole.
        spec["model"]["ignore_merges"] = True
        spec["model"]["merges"] = spec["model"]["merges"][::3]
    if variant == "shuffled merges":
        # No trainer gives such priorities, which cause many ties and overtaken merges.
        random.Random(1).shuffle(spec["model"]["merges"])
    return spec


def bytes_spec(
    added_tokens: Iterable[AddedToken] = (), merges: Iterable[tuple[str, str]] = ()
) -> dict[str, Any]:
    """A tokenizer.json of Qwen's kind with the bytes and the results of `merges` as vocabulary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges))
    tokenizer = Tokenizer(model)
    add_components(tokenizer)
    tokenizer.add_tokens(list(added_tokens))
    return json.loads(tokenizer.to_str())


def start_cli(
    folder: Path, *args: str | Path, lines: Iterable[str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs tokenizer_cli of a build folder, which must succeed if `check` is set. It is ended
    after five minutes of its own processor time, so that other processes do not matter."""
    program = folder / "tests" / "runner" / "tokenizer" / "tokenizer_cli"
    assert program.is_file(), f"{program}: build that target"
    done = subprocess.run(
        [program, *args],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (300, 300)),
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done


def run_cli(build_dir: Path, *args: str | Path, lines: Iterable[str]) -> list[Any]:
    """The JSON values that tokenizer_cli prints, one for each line."""
    done = start_cli(build_dir, *args, lines=lines)
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_contexts(context: str, code_points: list[int]) -> list[str]:
    """Texts of 64 code points each, every one put into `context` in place of {0}."""
    return [
        "".join(context.format(chr(c)) for c in code_points[i : i + 64])
        for i in range(0, len(code_points), 64)
    ]


def assert_same(texts: list[str], actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(texts)
    wrong = [i for i in range(len(texts)) if actual[i] != expected[i]]
    if wrong:
        i = min(wrong, key=lambda i: len(texts[i]))
        pytest.fail(
            f"{len(wrong)} of {len(texts)} texts differ, e.g. {texts[i][:500]!r}: "
            f"{actual[i][:100]}, expected {expected[i][:100]}"
        )
