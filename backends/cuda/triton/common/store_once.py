"""Stores a vector that every one of several threads holds."""

import triton
import triton.language as tl


@triton.jit
def store_once(target, value, mask, COPIES: tl.constexpr):
    """`tl.store` of vectors `[N]` that a sum along rows of COPIES threads left in each of them.

    The first thread of a row stores: to move a vector to where vectors are stored from would take
    two barriers.
    """
    copy = tl.arange(0, COPIES)[None, :]
    # Addresses that differ by copy, and the hint: one copy per thread, as the sum has left them.
    target = tl.max_contiguous(target[:, None] + copy, (1, 1))
    value = tl.broadcast_to(value[:, None], target.shape)
    tl.store(target, value, mask=mask[:, None] & (copy == 0))
