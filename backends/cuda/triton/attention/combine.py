"""How a cache is divided into splits, and how what was attended to in each is joined."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.cuda.triton.common.quantized_rows import (
    QuantizedRows,
    RowFormat,
    allocate_rows,
    quantize_tile,
)
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, find_sequence
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def divide(position, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many cached tokens a split has, an equal share rounded up to whole tiles of BLOCK_N, and
    how many splits there are with that, at least 1."""
    length = tl.maximum(tl.cdiv(tl.cdiv(position, SPLITS), BLOCK_N), 1) * BLOCK_N
    return length, tl.maximum(tl.cdiv(position, length), 1)


@triton.jit
def combine_kernel(
    qkv_ptr,
    positions_ptr,
    num_tokens_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    scale_ptr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    FIRST_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED_M: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Joins the splits of one row and query head, for BLOCK_D columns, and applies the output gate.

    With scale_ptr the result is quantized: out_ptr and it are the `QuantizedRows`, of PADDED_M
    rows, and BLOCK_D is one of their tiles.

    Padding becomes 0, and so do rows in front of FIRST_TOKEN. With a BLOCK_N the cache is divided
    for each row by `divide`; with 0 each split has left a maximum, -inf if it has no token.
    """
    head = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, SPLITS)
    item = tl.program_id(2)
    sequence, token = find_sequence(item, TOKENS)
    position = tl.load(positions_ptr + sequence).to(tl.int32) + token
    valid = count_valid_tokens(num_tokens_ptr + sequence, TOKENS, HAS_NUM_TOKENS) - token
    if FIRST_TOKEN > 0:
        valid = tl.where(position < FIRST_TOKEN, 0, valid)
    qkv_ptr += item.to(tl.int64) * (2 * (HEADS + KV_HEADS) * DIM)
    gate = tl.load(qkv_ptr + head * (2 * DIM) + DIM + column).to(tl.float32)
    wait_for_previous()
    target = out_ptr + item.to(tl.int64) * (HEADS * DIM) + head * DIM + column
    if scale_ptr is not None:
        tile = (head * DIM) // BLOCK_D + tl.program_id(1)
        scale_ptr += tile * PADDED_M + item
    if valid <= 0:
        if scale_ptr is not None:
            tl.store(scale_ptr, 0.0)
        tl.store(target, tl.zeros((BLOCK_D,), out_ptr.dtype.element_ty))
        return
    first = item * (SPLITS * HEADS)
    slot = split * HEADS + head
    if BLOCK_N > 0:
        used = split < divide(position, SPLITS, BLOCK_N)[1]
    else:
        used = tl.load(max_ptr + first + slot) > float("-inf")
    part = tl.load(
        partial_ptr + first.to(tl.int64) * DIM + slot[:, None] * DIM + column[None, :],
        mask=used[:, None],
        other=0.0,
    )
    top = tl.load(max_ptr + first + slot, mask=used, other=float("-inf"))
    total = tl.load(sum_ptr + first + slot, mask=used, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    o = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0) * tl.sigmoid(gate)
    if scale_ptr is not None:
        o, scale = quantize_tile(o[None, :], qkv_ptr.dtype.element_ty)
        tl.store(scale_ptr + tl.arange(0, 1), scale * SCALE_FACTOR)
        o = o.reshape((BLOCK_D,))
    tl.store(target, o.to(out_ptr.dtype.element_ty))


def join_splits(
    arguments: tuple[torch.Tensor, ...], heads: int, shape: dict, wanted: RowFormat | None
) -> torch.Tensor | QuantizedRows:
    """Launches `combine_kernel` for all rows of qkv and all query heads.

    Args:
        arguments: of the kernel in front of out_ptr; qkv is the first.
        shape: its constexprs from KV_HEADS to BLOCK_N, but for HEADS.
        wanted: how the linear layer behind it wants rows, if it takes them quantized. They are if a
            head has whole tiles.

    Returns:
        `[rows, Hq * D]` in the dtype of qkv, or these rows quantized.
    """
    config, dim, qkv = find_config("attention_combine", tokens=1), shape["DIM"], arguments[0]
    if dim % ACTIVATION_TILE:
        wanted = None
    config["BLOCK_D"] = min(config["BLOCK_D"], dim) if wanted is None else ACTIVATION_TILE
    result = allocate_rows(qkv, qkv.shape[0], heads * dim, wanted)
    shape = shape | result.shape
    grid = (heads, dim // config["BLOCK_D"], qkv.shape[0])
    launch(combine_kernel, grid, *arguments, *result.pointers, HEADS=heads, **shape, **config)
    return result.out
