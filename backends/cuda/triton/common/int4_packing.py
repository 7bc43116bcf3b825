"""Reorders the INT4 weights of a bundle, on the host, into what the kernels multiply."""

import torch

from et_moe.backends.threads import worker_threads

ZERO_BYTE = 0x88
"""A byte of two weights that are zero, as a bundle has it."""

_PIECE = 1 << 20
"""Bytes packed at a time; the temporaries of so few stay in the cache."""


def _pack_piece(halves: torch.Tensor, out: torch.Tensor) -> None:
    # The two columns in byte i of a half become the same nibble of bytes 2i and 2i + 1 of the run,
    # which are one little-endian word.
    words = halves.to(torch.int16, memory_format=torch.contiguous_format)
    words |= words << 4
    words &= 0x0F0F
    packed = torch.add(words[0], words[1], alpha=16, out=out.view(torch.int16))
    # A bundle has value + 8; flipping the top bit makes it two's complement.
    packed ^= 0x8888 - (1 << 16)


def pack_nibbles(runs: torch.Tensor) -> torch.Tensor:
    """Reorders the columns of an INT4 weight of a bundle within runs of bytes.

    Args:
        runs: `uint8 [N, ..., B]` with any strides; byte i of a run has column 2i in its low and
            column 2i + 1 in its high nibble, as value + 8.

    Returns:
        `uint8 [N, ..., B]`, contiguous; byte j of a run has column j in its low and column j + B
        in its high nibble, in two's complement.
    """
    out = torch.empty(runs.shape, dtype=torch.uint8, device=runs.device)
    if runs.is_meta:
        return out
    rows = max(1, _PIECE * len(runs) // max(1, runs.numel()))
    halves = runs.unflatten(-1, (2, -1)).movedim(-2, 0)
    with worker_threads() as pool:
        list(pool.map(_pack_piece, halves.split(rows, dim=1), out.split(rows)))
    return out
