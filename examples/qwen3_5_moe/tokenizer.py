"""The files of a byte-level BPE tokenizer in Qwen3.5's tokenizer.json format.

NFC, split by Qwen3.5's pattern, bytes as printable characters, BPE. Ids: the 256 bytes, the merges,
then the added tokens. Layout and pattern follow
https://huggingface.co/Qwen/Qwen3.5-35B-A3B/blob/main/tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
PLAIN_ADDED_TOKENS = ("<think>", "</think>")

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, sorted: themselves where printable in
    Latin-1, and U+0100 onwards for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(c) for c in [*printable, *range(0x100, 0x100 + 256 - len(printable))]]


def tokenizer_json(merges: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The contents of tokenizer.json with these BPE merges, best first.

    The pieces of a merge are bytes of `byte_alphabet` or results of earlier merges.
    """
    vocab = {token: index for index, token in enumerate(byte_alphabet())}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    added = [
        {
            "id": len(vocab) + index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": content in SPECIAL_TOKENS,
        }
        for index, content in enumerate(SPECIAL_TOKENS + PLAIN_ADDED_TOKENS)
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }


def added_token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Added token -> id, of a `tokenizer_json`."""
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
