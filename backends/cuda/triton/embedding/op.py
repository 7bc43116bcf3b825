"""The embedding with an INT8 table."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.launch import launch


@triton.jit
def _embedding_kernel(ids, weight, scale, out, VOCABULARY, H: tl.constexpr, BLOCK: tl.constexpr):
    """Row ids[t] of the table `int8 [VOCABULARY, H]` times its scale; zeros for an id outside."""
    row = tl.program_id(0)
    token = tl.load(ids + row)
    column = tl.arange(0, BLOCK)
    mask = (column < H) & (token >= 0) & (token < VOCABULARY)
    value = tl.load(weight + token * H + column, mask=mask, other=0).to(tl.float32)
    factor = tl.load(scale + token, mask=(token >= 0) & (token < VOCABULARY), other=0.0)
    value *= factor.to(tl.float32)
    at = out + row.to(tl.int64) * H + column
    tl.store(at, value.to(out.dtype.element_ty), mask=column < H)


def embedding_w8(
    ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`ops.embedding_w8`, but an id out of range gives a row of zeros; one launch.

    Args:
        ids: `int64 [T]`. weight: `int8 [V, H]`. scale: `bfloat16 [V, 1]`.

    Returns:
        `[T, H]` of dtype.
    """
    rows, (vocabulary, hidden) = ids.shape[0], weight.shape
    out = torch.empty((rows, hidden), dtype=dtype, device=ids.device)
    launch(
        _embedding_kernel,
        (rows,),
        ids,
        weight,
        scale,
        out,
        vocabulary,
        H=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=4,
    )
    return out
