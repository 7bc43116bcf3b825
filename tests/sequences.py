"""State of test sequences in pools, at places without an order."""

import torch
from torch import Tensor

from et_moe.backends import ops
from et_moe.backends.method_graph import PAGES, SLOTS
from et_moe.pipeline.models import Graph


def make_pages(capacities: list[int], spare: int = 3, seed: int = 0) -> tuple[Tensor, int]:
    """Page tables of sequences that hold so many tokens, and how many pages the pool has.

    Returns:
        `int32 [B, M]`, pages shuffled and none shared; entries that a sequence has no use for name
        page -1, which no kernel may follow. The pool has `spare` pages that belong to nobody.
    """
    counts = [-(-c // ops.PAGE_SIZE) for c in capacities]
    total = sum(counts) + spare
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    pages = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    for row, count, end in zip(pages, counts, torch.tensor(counts).cumsum(0).tolist(), strict=True):
        row[:count] = order[end - count : end]
    return pages, total


def read_cache(pool: Tensor, pages: Tensor, tokens: int) -> Tensor:
    """The first tokens of one sequence, `[Hkv, tokens, D]`. pool: `[P, Hkv, 64, D]`; pages: [M]."""
    token = torch.arange(tokens, device=pool.device)
    page = pages.long()[token // ops.PAGE_SIZE]
    return pool[page, :, token % ops.PAGE_SIZE].transpose(0, 1)


def make_slots(sequences: int, spare: int = 2, seed: int = 0) -> tuple[Tensor, int]:
    """Slots of sequences, `int32 [B]`, shuffled and none shared, and how many the pool has."""
    total = sequences + spare
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:sequences].to(torch.int32), total


def one_sequence(model: Graph, tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State of a model for one sequence of so many tokens, and inputs that say where it lies."""
    pages, total = make_pages([tokens])
    slots, count = make_slots(1)
    return model.make_state({PAGES: total, SLOTS: count}), {"slots": slots, "pages": pages}
