"""Ranges of the size that varies from call to call; a method is compiled once for each of them.

Which kernels a method launches, and in which tuned configurations, is decided while it is compiled.
Where the number of tokens is symbolic, the largest number counts: a range for a few tokens gets
kernels for a few tokens. The graph is the same in all ranges.
"""

import dataclasses

from et_moe.backends.cuda.triton.common.tokens import DECODE_TOKENS, LINEAR_ROWS

BOUNDS = (1, LINEAR_ROWS, DECODE_TOKENS, 64, 256)
"""Where one range ends and the next one begins. One row has kernels of its own. So have up to
`LINEAR_ROWS` in the linear layers, whose weights are most of what is read, and up to
`DECODE_TOKENS` in router and experts. Between the other numbers the best configurations change most
(`triton/tuning`)."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The sizes from `low` to `high`, both included."""

    low: int
    high: int


def split(low: int, high: int) -> list[Range]:
    """The ranges that sizes from `low` to `high` are cut into at `BOUNDS`, in rising order."""
    ends = [*(bound for bound in BOUNDS if low <= bound < high), high]
    starts = [low, *(end + 1 for end in ends)]
    return [Range(start, end) for start, end in zip(starts, ends, strict=False)]
