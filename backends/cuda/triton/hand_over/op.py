"""The end of a method: the drawn token goes to where the host and the next call look for it.

A kernel does this, since it can write to page-locked memory itself. A copy in a CUDA graph would
delay its neighbours ten times as long as a kernel does (docs/performance.md).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import launch


@triton.jit
def _hand_over_kernel(token, position, drawn, tokens):
    """What `hand_over` does, in one program."""
    wait_for_previous()
    value, at = tl.load(token), tl.load(position)
    tl.store(drawn + (at & 1), value)
    tl.store(tokens, value)
    tl.store(position, at + 1)


def hand_over(
    token: torch.Tensor,
    position: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Writes the token to drawn[position % 2] and prepares the inputs of the next call.

    Args:
        token: `int64 [1, 1]`, the drawn token.
        position: `int64 [1]`, at least 0; it is increased by 1 in place.
        drawn: `int64 [2]`, memory that the host can read, too.
        tokens: `int64 [1, 1]`, the method's input, which becomes the token.
    """
    launch(_hand_over_kernel, (1,), token, position, drawn, tokens, num_warps=1)
