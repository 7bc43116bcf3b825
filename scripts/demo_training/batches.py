"""Batches of conversations and documents."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from et_moe.scripts.demo_data.samples import Packed
from et_moe.scripts.demo_training.schedule import Progress

ROW = 512  # tokens of a document
PADDED_TO = 64
DOCUMENT_EPOCHS = 10


@dataclass(frozen=True)
class Batch:
    """Texts of one length, padded at their ends."""

    kind: str
    """ "conversations" or "documents"."""
    tokens: Tensor
    """int64 [B, T]."""
    learned: Tensor
    """bool [B, T]: whether a token is one to predict; a text's first never is."""
    kept: Tensor
    """bool [B, T]: whether a token is no padding."""


class Conversations:
    """Conversations of about the same length in batches.

    Args:
        packed: the conversations.
        size: tokens of a batch, padding included; a long conversation may be more.
        device: where batches lie.
    """

    def __init__(self, packed: Packed, size: int, device: torch.device) -> None:
        self._ids = torch.from_numpy(packed.ids.astype(np.int16)).to(device)
        self._learned = torch.from_numpy(packed.learned).to(device)
        self._begins = np.cumsum(packed.lengths) - packed.lengths
        self._lengths, self._size, self._device = packed.lengths, size, device

    def batch(self, rows: np.ndarray) -> Batch:
        """The batch of these conversations, by their numbers."""
        lengths = self._lengths[rows]
        width = -(-int(lengths.max()) // PADDED_TO) * PADDED_TO
        begins = torch.from_numpy(self._begins[rows].astype(np.int64)).to(self._device)
        places = torch.arange(width, device=self._device)
        kept = places < torch.from_numpy(lengths.astype(np.int64)).to(self._device)[:, None]
        index = (begins[:, None] + places).clamp(max=len(self._ids) - 1)
        tokens = torch.where(kept, self._ids[index].long(), 0)
        return Batch("conversations", tokens, self._learned[index] & kept & (places > 0), kept)

    def in_order(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Every conversation once, with their numbers."""
        for rows in self._cut(np.argsort(self._lengths, kind="stable")):
            yield rows, self.batch(rows)

    def epoch(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Every conversation once, in random order; neighbours in length stay together."""
        near = self._lengths + rng.uniform(0, PADDED_TO, len(self._lengths))
        pieces = self._cut(np.argsort(near))
        for number in rng.permutation(len(pieces)):
            yield self.batch(pieces[number])

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Rows in ascending length, in pieces of at most `size` tokens."""
        pieces, begin = [], 0
        for end in range(1, len(order) + 1):
            width = -(-int(self._lengths[order[end - 1]]) // PADDED_TO) * PADDED_TO
            if end - begin > 1 and (end - begin) * width > self._size:
                pieces.append(order[begin : end - 1])
                begin = end - 1
        return [*pieces, order[begin:]]


class Documents:
    """Rows of a stream of text, cut at a new offset in each epoch.

    Args:
        ids: int64 [n].
        size: tokens of a batch.
        device: where batches lie.
    """

    def __init__(self, ids: Tensor, size: int, device: torch.device) -> None:
        self._ids, self.rows = ids.to(device), max(1, size // ROW)

    def __len__(self) -> int:
        return len(self._ids)

    def epoch(self, rng: np.random.Generator) -> Iterator[Batch]:
        """Every row once, in random order."""
        offset = int(rng.integers(ROW))
        count = (len(self._ids) - offset) // ROW
        rows = self._ids[offset : offset + count * ROW].view(count, ROW)
        order = torch.from_numpy(rng.permutation(count)).to(rows.device)
        for tokens in rows[order].split(self.rows):
            kept = torch.ones_like(tokens, dtype=torch.bool)
            learned = kept.clone()
            learned[:, 0] = False
            yield Batch("documents", tokens, learned, kept)


def _endless(texts: Conversations | Documents, rng: np.random.Generator) -> Iterator[Batch]:
    while True:
        yield from texts.epoch(rng)


def mixed(
    conversations: Conversations, documents: Documents, progress: Progress, seed: int
) -> Iterator[Batch]:
    """Batches until a training is done: conversations, and in between, evenly spread, as many
    documents as make DOCUMENT_EPOCHS epochs, or half of all batches if that is less."""
    rng = np.random.default_rng(seed)
    talks, texts = _endless(conversations, rng), _endless(documents, rng)
    shown, before = 0, True
    while (share := progress.share) < 1:
        if before or shown > share * DOCUMENT_EPOCHS * len(documents):
            before = False
            yield next(talks)
        else:
            before = True
            batch = next(texts)
            shown += batch.tokens.numel()
            yield batch
