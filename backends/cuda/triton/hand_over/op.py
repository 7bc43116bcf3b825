"""The end of a method: the drawn token goes where the host and the next call look for it.

A copy in a CUDA graph waits for the kernels before it and keeps back those behind it ten times as
long as a kernel does (docs/performance.md); a kernel can write to page-locked memory itself.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import launch


@triton.jit
def _hand_over_kernel(token, position, drawn, tokens):
    wait_for_previous()
    value, at = tl.load(token), tl.load(position)
    tl.store(drawn + (at & 1), value)
    if tokens is not None:
        tl.store(tokens, value)
        tl.store(position, at + 1)


def hand_over(
    token: torch.Tensor,
    position: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor | None,
) -> None:
    """Writes the token to drawn[position % 2] and, if `tokens` is given, makes the inputs of the
    next call of those of this one: `tokens` becomes the token, `position` its successor.

    Args:
        token: `int64 [1, 1]`. position: `int64 [1]`, at least 0.
        drawn: `int64 [2]`, memory that the host sees, too. tokens: `int64 [1, 1]` or None.
    """
    launch(_hand_over_kernel, (1,), token, position, drawn, tokens, num_warps=1)
