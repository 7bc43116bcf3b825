"""Conversations as token ids, with a mark on those that a model learns to say."""

import multiprocessing
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from et_moe.scripts.demo_data.conversations import Conversation, Maker
from et_moe.scripts.demo_data.library import Fact
from et_moe.serving.chat_template import ChatTemplate, read_chat_template

LONGEST = 1024
SHARD = 500
_ANSWERS = re.compile(r"<\|im_start\|>assistant\n(?:<think>\n)?(.*?<\|im_end\|>)", re.DOTALL)


@dataclass
class Sample:
    """A conversation's tokens."""

    kind: str
    ids: list[int]
    learned: list[bool]
    """Whether the token is one that the assistant says."""
    answer: int
    """Index of the last answer's first token, behind its thinking."""


class Encoder:
    """Conversations to tokens, as they reach a served model: a prompt, and what follows it.

    Args:
        template: of the checkpoint.
        tokenizer: likewise.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._close = tokenizer.token_to_id("</think>")

    def encode(self, conversation: Conversation) -> Sample:
        """Earlier answers are learned too, in the form that the template gives them."""
        messages, tools = conversation.messages, conversation.tools or None
        prompt = self._template.render(messages[:-1], tools, enable_thinking=conversation.thinking)
        whole = self._template.render(messages, tools, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(f"the template writes {whole!r}, which does not go on from {prompt!r}")
        before = self._tokenizer.encode(prompt)
        spans = [match.span(1) for match in _ANSWERS.finditer(prompt)]
        learned = [
            any(begin <= first and last <= end for begin, end in spans)
            for first, last in before.offsets
        ]
        after = self._tokenizer.encode(whole[len(prompt) :].removesuffix("\n")).ids
        answer = len(before.ids)
        if conversation.thinking:
            answer += after.index(self._close) + 2  # and a token of two line breaks
        ids = [*before.ids, *after]
        return Sample(conversation.kind, ids, learned + [True] * len(after), answer)


def make_samples(
    checkpoint: Path, facts: list[Fact], seed: str, count: int, held_out: bool = False
) -> list[Sample]:
    """Samples of conversations that fit into LONGEST tokens.

    Args:
        checkpoint: where the chat template and the tokenizer lie.
        facts: of the standard library.
        seed: of all draws.
        count: how many.
        held_out: of words that training never sees.
    """
    template = read_chat_template(checkpoint)
    if template is None:
        raise ValueError(f"{checkpoint}: expected chat_template.jinja")
    encoder = Encoder(template, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    maker = Maker(facts, random.Random(seed), held_out)
    samples: list[Sample] = []
    while len(samples) < count:
        sample = encoder.encode(maker.conversation())
        if len(sample.ids) <= LONGEST:
            samples.append(sample)
    return samples


@dataclass
class Packed:
    """Many samples in few arrays."""

    ids: np.ndarray
    """uint16 [tokens], one sample after the other."""
    learned: np.ndarray
    """bool [tokens]."""
    lengths: np.ndarray
    """int32 [samples]."""
    answers: np.ndarray
    """int32 [samples]: where in a sample its last answer begins."""
    kinds: list[str]

    @classmethod
    def of(cls, samples: list[Sample]) -> "Packed":
        return cls(
            np.concatenate([np.array(s.ids, np.uint16) for s in samples]),
            np.concatenate([np.array(s.learned, bool) for s in samples]),
            np.array([len(s.ids) for s in samples], np.int32),
            np.array([s.answer for s in samples], np.int32),
            [s.kind for s in samples],
        )

    @classmethod
    def joined(cls, parts: "list[Packed]") -> "Packed":
        arrays = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "learned", "lengths", "answers")
        )
        return cls(*arrays, [kind for part in parts for kind in part.kinds])


def _shard(checkpoint: Path, facts: list[Fact], seed: str, count: int) -> Packed:
    return Packed.of(make_samples(checkpoint, facts, seed, count))


def _in_processes(
    checkpoint: Path, facts: list[Fact], seed: int, count: int, processes: int
) -> Iterator[Packed]:
    context = multiprocessing.get_context("fork")  # spawning would import torch in each
    with ProcessPoolExecutor(processes, context) as pool:
        shards = range(-(-count // SHARD))
        futures = [
            pool.submit(_shard, checkpoint, facts, f"{seed} {n}", min(SHARD, count)) for n in shards
        ]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def generate(
    checkpoint: Path, facts: list[Fact], seed: int, count: int, processes: int, seconds: float
) -> Packed:
    """Samples for training, made by several processes at once.

    Args:
        count: how many are wanted.
        seconds: after which no more are made; there is one shard at least.
    """
    end = time.monotonic() + seconds
    parts: list[Packed] = []
    for part in _in_processes(checkpoint, facts, seed, count, processes):
        parts.append(part)
        if time.monotonic() > end:
            break
    return Packed.joined(parts)
