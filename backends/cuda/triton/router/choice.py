"""The choice of experts from the router's logits."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.float_order import from_order_key, to_order_key
from et_moe.backends.cuda.triton.common.launch import launch
from et_moe.backends.ops.sequences import rows_each


@triton.jit
def _choose_kernel(
    logits,
    num_tokens,
    own_rows,
    topk_weights,
    topk_ids,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """All slots of one token: the TOP_K experts with the largest logits, and their weights.

    The weights are the softmax of the chosen logits if NORMALIZE, else that of all logits.

    logits is fp32 `[T, EXPERTS + 1]`, and the last is that of the shared experts' gate.
    num_tokens is int64 `[T / own_rows]`: how many of each sequence's rows are valid. topk_weights
    is fp32, topk_ids int32, both `[T, TOP_K + NUM_SHARED]`.
    """
    wait_for_previous()
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    LEAST: tl.constexpr = -0x80000000
    row = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, triton.next_power_of_2(SLOTS))
    at = logits + row.to(tl.int64) * (EXPERTS + 1)
    values = tl.load(at + expert, mask=expert < EXPERTS)
    gate = tl.load(at + EXPERTS)
    valid = row >= 0
    if num_tokens is not None:
        valid = row % own_rows < tl.load(num_tokens + row // own_rows)
    # NaNs come first, whatever their sign.
    keys = tl.where(values == values, to_order_key(values), 0x7FFFFFFF)
    keys = tl.where(expert < EXPERTS, keys, LEAST)
    ids = tl.where(slot < SLOTS, EXPERTS + slot - TOP_K, 0)
    best_keys = tl.full(slot.shape, LEAST, tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(keys, axis=0)
        chosen = tl.min(tl.where(keys == best, expert, BLOCK_E), axis=0)
        keys = tl.where(expert == chosen, LEAST, keys)
        ids = tl.where(slot == i, chosen, ids)
        best_keys = tl.where(slot == i, best, best_keys)
        if i == 0:
            largest = from_order_key(best)
    weights = tl.exp(from_order_key(best_keys) - largest)
    weights = tl.where(slot < TOP_K, weights, 0.0)
    if NORMALIZE:
        weights /= tl.sum(weights, axis=0)
    else:
        weights /= tl.sum(tl.where(expert < EXPERTS, tl.exp(values - largest), 0.0), axis=0)
    weights = tl.where(slot < TOP_K, weights, 1.0 / (1.0 + tl.exp(-gate)))
    at = row.to(tl.int64) * SLOTS + slot
    tl.store(topk_weights + at, tl.where(valid, weights, 0.0), mask=slot < SLOTS)
    tl.store(topk_ids + at, tl.where(valid, ids, -1), mask=slot < SLOTS)


def choose_experts(
    logits: torch.Tensor,
    num_tokens: torch.Tensor | None,
    top_k: int,
    num_shared: int,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `float32` and ids `int32` of the chosen and the shared experts, `[T, slots]` each.

    Args:
        logits: `float32 [T, E + 1]`, the shared experts' gate last.
        num_tokens, top_k, num_shared, normalize: as `ops.moe_router` takes them.
    """
    tokens, experts = logits.shape[0], logits.shape[1] - 1
    slots = (tokens, top_k + num_shared)
    topk_weights, topk_ids = logits.new_empty(slots), logits.new_empty(slots, dtype=torch.int32)
    each = tokens if num_tokens is None else rows_each(tokens, num_tokens.shape[0])
    launch(
        _choose_kernel,
        (tokens,),
        logits,
        num_tokens,
        each,
        topk_weights,
        topk_ids,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        TOP_K=top_k,
        NUM_SHARED=num_shared,
        NORMALIZE=normalize,
        num_warps=1,
    )
    return topk_weights, topk_ids
