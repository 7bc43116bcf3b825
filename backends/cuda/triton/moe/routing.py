"""Around the grouped GEMMs: pairs of token and slot are sorted by expert, and slots summed up."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _scatter(ids, expert, rows, place, pair):
    """Writes each lane's pair, if it is one of `expert`, to the lane's place in rows.

    Returns:
        The lanes' next places.
    """
    match = ids == expert
    tl.store(rows + place, pair, mask=match)
    return place + match.to(tl.int32)


@triton.jit
def _route_kernel(
    topk_ids,
    rows,
    block_experts,
    num_pairs,
    num_blocks,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program e puts the pairs of token and slot of expert e into blocks of BLOCK_M rows.

    If lower experts have `first` pairs, the blocks of e start at first // BLOCK_M + e. That leaves
    room for all blocks of the lower experts without knowing how many each has, and
    num_pairs // BLOCK_M + EXPERTS blocks hold everything. Pair CHUNK i + l belongs to lane l. The
    pairs of a lane follow each other, so that one scan over the lanes' counts gives all places.

    rows is int32 `[num_blocks * BLOCK_M]`: pairs, and -1 in the unused rows of a block.
    block_experts is int32 `[num_blocks]`: -1 for a block that stays empty, whose rows are not
    written.
    """
    wait_for_previous()
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    full = num_pairs // CHUNK * CHUNK  # up to here there are no masks, and loads have 16 bytes
    inside = full + lane < num_pairs
    rest = tl.load(topk_ids + full + lane, mask=inside, other=-1)
    lower = ((rest >= 0) & (rest < expert)).to(tl.int32)
    equal = (rest == expert).to(tl.int32)
    for start in tl.range(0, full, CHUNK, num_stages=3):
        ids = tl.load(topk_ids + start + lane)
        lower += ((ids >= 0) & (ids < expert)).to(tl.int32)
        equal += (ids == expert).to(tl.int32)
    first = tl.sum(lower, axis=0)
    count = tl.sum(equal, axis=0)
    block = first // BLOCK_M + expert
    used = (count + BLOCK_M - 1) // BLOCK_M

    place = block * BLOCK_M + tl.cumsum(equal, axis=0) - equal
    for start in tl.range(0, full, CHUNK, num_stages=3):
        ids = tl.load(topk_ids + start + lane)
        place = _scatter(ids, expert, rows, place, start + lane)
    _scatter(rest, expert, rows, place, full + lane)
    row = count + tl.arange(0, BLOCK_M)
    unused = tl.full((BLOCK_M,), -1, tl.int32)
    tl.store(rows + block * BLOCK_M + row, unused, mask=row < used * BLOCK_M)

    end = (first + count) // BLOCK_M + expert + 1
    if expert == EXPERTS - 1:
        end = num_blocks
    for begin in range(block, end, 32):
        i = begin + tl.arange(0, 32)
        tl.store(block_experts + i, tl.where(i < block + used, expert, -1), mask=i < end)


def route(
    topk_ids: torch.Tensor, experts: int, config: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the pairs of token and slot by expert, on the device and without atomics.

    Args:
        topk_ids: int32 or int64 `[T, S]`; ids outside of 0..experts-1 are left out. A pair is the
            index of one of them.
        config: of the launch, with `BLOCK_M`, the number of rows of a block.

    Returns:
        Pairs, `int32 [blocks * BLOCK_M]`, -1 for an unused row, and the expert of each block,
        `int32 [blocks]`, -1 for an empty one, whose rows are undefined.
    """
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    num_blocks = pairs // config["BLOCK_M"] + experts
    rows = topk_ids.new_empty((num_blocks * config["BLOCK_M"],), dtype=torch.int32)
    block_experts = topk_ids.new_empty((num_blocks,), dtype=torch.int32)
    launch(
        _route_kernel,
        (experts,),
        topk_ids.contiguous(),
        rows,
        block_experts,
        pairs,
        num_blocks,
        EXPERTS=experts,
        **config,
    )
    return rows, block_experts


@triton.jit
def _sum_slots_kernel(
    parts,
    unit,
    topk_ids,
    residual,
    out,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the slots of one token, in order, and the residual, for BLOCK columns.

    `sum_slots` describes the arguments; parts is `[T, SLOTS, HIDDEN]`.
    """
    token = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1) * (BLOCK // SPAN) + tl.arange(0, BLOCK // SPAN)
    column = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = column < HIDDEN
    if residual is not None:
        before = tl.load(residual + token * HIDDEN + column, mask=inside)
    wait_for_previous()
    total = tl.zeros((BLOCK // SPAN, SPAN), tl.float32)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(topk_ids + token * SLOTS + slot)
        # The parts of skipped slots were never written.
        mask = inside & (expert >= 0) & (expert < EXPERTS)
        pair = token * SLOTS + slot
        part = tl.load(parts + pair * HIDDEN + column, mask=mask, other=0.0).to(tl.float32)
        if unit is not None:
            used = (span < UNITS) & (expert >= 0) & (expert < EXPERTS)
            part *= tl.load(unit + pair * UNITS + span, mask=used, other=0.0)[:, None]
        total += part
    if residual is not None:
        total += before.to(tl.float32)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=inside)


def sum_slots(
    parts: torch.Tensor,
    unit: torch.Tensor | None,
    span: int,
    topk_ids: torch.Tensor,
    residual: torch.Tensor | None,
    experts: int,
    out: torch.Tensor,
) -> None:
    """Writes to out the sum of the parts over the slots of each token, in order, plus residual.

    Args:
        parts: float `[T * S, H]`; rows of slots whose id is outside of 0..experts-1 are left out.
        unit: `float32 [T * S, N]` with N * span >= H, by which parts are multiplied; None for 1.
        span: how many columns share a unit, a power of two.
        topk_ids: int32 or int64 `[T, S]`.
        residual, out: `[T, H]`; residual may be None.
    """
    tokens, slots = topk_ids.shape
    hidden = parts.shape[1]
    config = find_config("moe_sum_slots", tokens=tokens)
    config["BLOCK"] = max(config["BLOCK"], span)
    launch(
        _sum_slots_kernel,
        (tokens, cdiv(hidden, config["BLOCK"])),
        parts,
        unit,
        topk_ids.contiguous(),
        None if residual is None else residual.contiguous(),
        out,
        EXPERTS=experts,
        SLOTS=slots,
        HIDDEN=hidden,
        UNITS=1 if unit is None else unit.shape[1],
        SPAN=span,
        **config,
    )
