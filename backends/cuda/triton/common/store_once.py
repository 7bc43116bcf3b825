"""Stores a vector of which several threads hold copies."""

import triton
import triton.language as tl


@triton.jit
def store_once(target, value, mask, COPIES: tl.constexpr):
    """`tl.store` of a vector that a sum along rows of COPIES threads left in all of these.

    The first thread of each row stores its copy. `tl.store` would first move the vector to other
    threads, which takes two barriers.

    Args:
        target, value, mask: `[N]`, as `tl.store` takes them.
    """
    copy = tl.arange(0, COPIES)[None, :]
    # Addresses that differ by copy, and the hint that they are not contiguous, keep one copy in
    # each thread, as the sum left them.
    target = tl.max_contiguous(target[:, None] + copy, (1, 1))
    value = tl.broadcast_to(value[:, None], target.shape)
    tl.store(target, value, mask=mask[:, None] & (copy == 0))
