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


@triton.jit
def _hand_over_drafts_kernel(
    step, positions, drawn, tokens, versions, calls, ROW, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """What `hand_over_drafts` does for one sequence, with BLOCK from WIDTH on. ROW: elements of
    drawn from call to call."""
    wait_for_previous()
    sequence = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(step + sequence * WIDTH + column, mask=inside)
    accepted = tl.load(step + sequence * WIDTH)
    call = tl.load(calls + sequence)
    tl.store(drawn + (call & 1) * ROW + sequence * WIDTH + column, value, mask=inside)
    # The first element is no token.
    tl.store(tokens + sequence * (WIDTH - 1) + column - 1, value, mask=inside & (column > 0))
    tl.store(positions + sequence, tl.load(positions + sequence) + accepted + 1)
    tl.store(versions + sequence, accepted)
    tl.store(calls + sequence, call + 1)


def hand_over_drafts(
    step: torch.Tensor,
    positions: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    versions: torch.Tensor,
    calls: torch.Tensor,
) -> None:
    """Writes step b to drawn[calls[b] % 2, b] and prepares the inputs of the next call.

    How far a call goes that is fed drafts is not known before, so calls are counted here.

    Args:
        step: `int64 [B, 1 + R]`: how many drafts were accepted, and the tokens of the next call.
        positions: `int64 [B]`; they are increased by 1 + accepted in place.
        drawn: `int64 [2, B, 1 + R]`, memory that the host can read, too. Its first dimension may
            have another stride.
        tokens: `int64 [B, R]`, the method's input, which becomes the tokens.
        versions: `int64 [B]`, the method's input, which becomes the number of accepted drafts.
        calls: `int64 [B]`, increased by 1 in place.
    """
    sequences, width = step.shape
    launch(
        _hand_over_drafts_kernel,
        (sequences,),
        step,
        positions,
        drawn,
        tokens,
        versions,
        calls,
        drawn.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )


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
