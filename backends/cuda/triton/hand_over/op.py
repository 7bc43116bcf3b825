"""The end of a method: drawn tokens go to where the host and the next call look for them.

A kernel does this, since it can write to page-locked memory itself. A copy in a CUDA graph would
delay its neighbours ten times as long as a kernel does (docs/performance.md).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, is_one, launch


@triton.jit
def _hand_over_kernel(token, positions, drawn, tokens, sequences, ROW, BLOCK: tl.constexpr):
    """What `hand_over` does for BLOCK sequences. ROW: elements of drawn from row to row."""
    wait_for_previous()
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sequence < sequences
    value = tl.load(token + sequence, mask=inside)
    at = tl.load(positions + sequence, mask=inside, other=0)
    tl.store(drawn + (at & 1) * ROW + sequence, value, mask=inside)
    tl.store(tokens + sequence, value, mask=inside)
    tl.store(positions + sequence, at + 1, mask=inside)


def hand_over(
    token: torch.Tensor,
    positions: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Writes token b to drawn[positions[b] % 2, b] and prepares the inputs of the next call.

    So the host, which knows each sequence's position, can read a token while the next is drawn.

    Args:
        token: `int64 [B, 1]`, the drawn tokens.
        positions: `int64 [B]`, at least 0; they are increased by 1 in place.
        drawn: `int64 [2, B]`, memory that the host can read, too. Its rows may lie further apart.
        tokens: `int64 [B, 1]`, the method's input, which becomes the tokens.
    """
    sequences = positions.shape[0]
    block, warps = (1, 1) if is_one(sequences) else (128, 4)
    launch(
        _hand_over_kernel,
        (cdiv(sequences, block),),
        token,
        positions,
        drawn,
        tokens,
        sequences,
        drawn.stride(0),
        BLOCK=block,
        num_warps=warps,
    )
