"""Byte-level BPE tokenizers in the format of Qwen3.5's tokenizer.json, for checkpoints made here.

NFC, split by Qwen3.5's pattern, bytes, BPE; ids: the vocabulary first, then the added tokens, as in
https://huggingface.co/Qwen/Qwen3.5-35B-A3B/blob/main/tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
PLAIN_ADDED_TOKENS = ("<think>", "</think>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens, added ones included, with merges from `texts`.

    Without texts it has no merges: a token per byte, then the added tokens.

    Raises:
        ValueError: `vocab_size` is too small for the 256 bytes and the added tokens.
    """
    added = len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + added:
        raise ValueError(
            f"vocab_size {vocab_size}: expected at least {len(alphabet) + added}, "
            f"{len(alphabet)} bytes and {added} added tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=False) for t in PLAIN_ADDED_TOKENS]
    )
    return _with_published_fields(tokenizer)


def _with_published_fields(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with the fields that only JSON can set as the published file has them."""
    fields = json.loads(tokenizer.to_str())
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    fields["post_processor"] = {"type": "ByteLevel", **byte_level}
    fields["decoder"] = {"type": "ByteLevel", **byte_level}
    fields["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return Tokenizer.from_str(json.dumps(fields))


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
