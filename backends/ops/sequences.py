"""Rows of sequences, and where the state of a sequence lies.

Most ops work on rows and know of no sequences. Those that keep state take B sequences of R rows
each: row b * R + r is row r of sequence b. Their state lies in a pool that sequences share:

- A KV cache is made of pages of `PAGE_SIZE` tokens, `[P, Hkv, PAGE_SIZE, D]`. `pages`,
  `int32 [B, M]`, names those of each sequence in order: token t lies in page `pages[b, t // 64]`.
  Entries that no valid token needs are never read (Kwon et al., "Efficient Memory Management for
  Large Language Model Serving with PagedAttention", 2023).
- Convolution and recurrent state lie in slots, `[S, ...]`; `slots`, `int32 [B]`, names that of each
  sequence.

`num_tokens`, `int64 [B]`, says how many of a sequence's rows are valid. The rows behind them are
padding, whose outputs are undefined; a sequence without valid rows changes no state, and nothing is
read through its slot and its pages. Valid sequences never share a slot or a page that is written.
"""

from collections.abc import Iterator

import torch

PAGE_SIZE = 64
"""Tokens of a page of the KV cache."""


def sequence_rows(
    rows: int, sequences: int, num_tokens: torch.Tensor | None
) -> Iterator[tuple[int, int, int]]:
    """Index, first row and number of valid rows of every sequence that has valid rows.

    Args:
        rows: B * R, of all sequences.
        num_tokens: `int64 [B]`, or None if all rows are valid.

    Raises:
        ValueError: the rows are no multiple of the sequences.
    """
    if rows % sequences:
        raise ValueError(f"{rows} rows cannot be shared equally by {sequences} sequences")
    each = rows // sequences
    for b in range(sequences):
        valid = each if num_tokens is None else min(each, int(num_tokens[b]))
        if valid > 0:
            yield b, b * each, valid


def is_padding(rows: int, num_tokens: torch.Tensor) -> torch.Tensor:
    """Which rows are padding: bool `[rows]`. num_tokens: `int64 [B]`, see `sequence_rows`."""
    each = rows // num_tokens.shape[0]
    row = torch.arange(each, device=num_tokens.device)
    return (row[None, :] >= num_tokens[:, None]).reshape(-1)
