"""The embedding with an INT8 or an INT4 table."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.ops import GROUP_SIZES


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


@triton.jit
def _embedding_w4_kernel(
    ids, weight, scale, out, VOCABULARY, H: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Row ids[t] of the table `uint8 [VOCABULARY, H/2]` times the scales of its groups; zeros for
    an id outside. BLOCK is a power of two that is not less than H / 2."""
    row = tl.program_id(0)
    token = tl.load(ids + row)
    byte = tl.arange(0, BLOCK)
    mask = (byte < H // 2) & (token >= 0) & (token < VOCABULARY)
    # 0x88 is two weights of zero.
    packed = tl.load(weight + token * (H // 2) + byte, mask=mask, other=0x88).to(tl.int32)
    factor = tl.load(scale + token * (H // GROUP) + byte // (GROUP // 2), mask=mask, other=0.0)
    factor = factor.to(tl.float32)
    even = ((packed & 0xF) - 8).to(tl.float32) * factor
    odd = ((packed >> 4) - 8).to(tl.float32) * factor
    column = tl.arange(0, 2 * BLOCK)
    at = out + row.to(tl.int64) * H + column
    tl.store(at, tl.interleave(even, odd).to(out.dtype.element_ty), mask=column < H)


def embedding_w4(
    ids: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`ops.embedding_w4`, but an id out of range gives a row of zeros; one launch.

    Args:
        ids: `int64 [T]`. weight: `uint8 [V, H/2]`. scale: `[V, H/group_size]`, bfloat16 or float16.

    Returns:
        `[T, H]` of dtype.
    """
    rows, (vocabulary, row_bytes) = ids.shape[0], weight.shape
    hidden = 2 * row_bytes
    if group_size not in GROUP_SIZES or tuple(scale.shape) != (vocabulary, hidden // group_size):
        found = f"scale {tuple(scale.shape)} for weight {tuple(weight.shape)}"
        raise ValueError(f"{found} is not what quantize_w4 makes with group_size {group_size}")
    out = torch.empty((rows, hidden), dtype=dtype, device=ids.device)
    launch(
        _embedding_w4_kernel,
        (rows,),
        ids,
        weight,
        scale,
        out,
        vocabulary,
        H=hidden,
        GROUP=group_size,
        BLOCK=triton.next_power_of_2(row_bytes),
        num_warps=4,
    )
    return out
