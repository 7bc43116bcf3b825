"""The documentation in Python's standard library, and a tokenizer made of it."""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer
from tokenizers.trainers import BpeTrainer

from et_moe.examples.qwen3_5_moe.tokenizer import (
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    byte_alphabet,
    tokenizer_json,
)

VOCAB_SIZE = 2048
HELD_OUT_BYTES = 30_000
EXCLUDED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-"})


def clean(text: str) -> str:
    """The text with plain quotes, and without spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.translate(TO_ASCII).strip().splitlines())


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings at and below `node`, in source order and without their indentation."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
        yield clean(text)
    for child in ast.iter_child_nodes(node):
        yield from docstrings(child)


def collect_documents() -> dict[str, str]:
    """A text for the name of each standard library module and of each topic of `help()`.

    No docstring appears twice; those that are shorter than 20 characters or not ASCII are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRECTORIES & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # lib2to3 and others keep templates that are not Python 3
            continue
        kept = []
        for text in docstrings(tree):
            if len(text) >= 20 and text.isascii() and text not in seen:
                seen.add(text)
                kept.append(text)
        if kept:
            documents[relative.as_posix()] = "\n\n".join(kept)
    for name, text in sorted(topics.items()):
        documents[f"topic {name}"] = clean(text)
    return documents


def split_held_out(documents: dict[str, str], seed: int) -> tuple[list[str], list[str]]:
    """The training and the held-out documents, both shuffled; no topic is held out."""
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    held_out: list[str] = []
    size = 0
    for name in names:
        length = len(documents[name])
        if size < HELD_OUT_BYTES and not name.startswith("topic ") and 500 < length < 6000:
            held_out.append(name)
            size += length
    training = [documents[name] for name in names if name not in held_out]
    return training, [documents[name] for name in held_out]


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens, added ones included, with merges from `documents`."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json() | {"added_tokens": []}))
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(PLAIN_ADDED_TOKENS),
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Tokenizer.from_str(json.dumps(tokenizer_json(merges)))
