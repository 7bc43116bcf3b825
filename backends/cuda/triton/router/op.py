"""The router of the mixture of experts; the contract is `ops.moe_router`.

A few rows: logits over many programs, each of which norms the row anew. Many rows: the norm and the
shared expert's gate row by row, then the logits on tensor cores. Behind both, one program per row
chooses.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.float_order import from_order_key, to_order_key
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm
from et_moe.backends.cuda.triton.common.tokens import is_decode
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _normed_row(x, gain, row, eps, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Row of x after RMSNorm with the weights `gain [BLOCK_H]`: fp32 `[BLOCK_H]`, zero from H."""
    column = tl.arange(0, BLOCK_H)
    value = tl.load(x + row.to(tl.int64) * H + column, mask=column < H, other=0.0).to(tl.float32)
    return apply_rms_norm(value, gain, tl.sum(value * value, axis=0) / H, eps, x.dtype.element_ty)


@triton.jit
def _decode_logits_kernel(
    x,
    norm_weight,
    weight,
    normed_x,
    logits,
    eps,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """logits `[M, ROWS]` of BLOCK_E rows of weight `[ROWS, H]` and one token; the first program of
    a token also writes its normed row."""
    row = tl.program_id(1)
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_H)
    mask = (expert < ROWS)[:, None] & (column < H)[None, :]
    # The weights are on their way before x exists.
    w = tl.load(weight + expert[:, None] * H + column[None, :], mask=mask, other=0.0)
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    wait_for_previous()
    value = _normed_row(x, gain, row, eps, H, BLOCK_H)
    result = tl.sum(w.to(tl.float32) * value[None, :], axis=1)
    tl.store(logits + row * ROWS + expert, result, mask=expert < ROWS)
    if tl.program_id(0) == 0:
        at = normed_x + row.to(tl.int64) * H + column
        tl.store(at, value.to(x.dtype.element_ty), mask=column < H)


@triton.jit
def _choose_kernel(
    logits,
    num_tokens,
    topk_weights,
    topk_ids,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
):
    """Top-k and softmax over its logits: all slots of one token, from logits `[M, EXPERTS + 1]`.

    The last logit is that of the shared experts' gate.
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
        valid = row < tl.load(num_tokens)
    # Integers, of which a warp finds the largest in one instruction: NaNs come first, whatever
    # their sign, and adding 0 makes equals of zeros.
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
    weights /= tl.sum(weights, axis=0)
    weights = tl.where(slot < TOP_K, weights, 1.0 / (1.0 + tl.exp(-gate)))
    at = row.to(tl.int64) * SLOTS + slot
    tl.store(topk_weights + at, tl.where(valid, weights, 0.0), mask=slot < SLOTS)
    tl.store(topk_ids + at, tl.where(valid, ids, -1), mask=slot < SLOTS)


@triton.jit
def _norm_gate_kernel(
    x,
    norm_weight,
    gate_weight,
    normed_x,
    logits,
    eps,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """normed_x `[M, H]` and the gate's logit, the last of `[M, ROWS]`, one row per program."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    w = tl.load(gate_weight + column, mask=column < H, other=0.0).to(tl.float32)
    wait_for_previous()
    value = _normed_row(x, gain, row, eps, H, BLOCK_H)
    at = normed_x + row.to(tl.int64) * H + column
    tl.store(at, value.to(x.dtype.element_ty), mask=column < H)
    tl.store(logits + row * ROWS + ROWS - 1, tl.sum(w * value, axis=0))


@triton.jit
def _prefill_logits_kernel(
    normed_x,
    weight,
    logits,
    M,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits `[M, ROWS]` of BLOCK_E experts, all but the last row of weight, and BLOCK_M tokens."""
    wait_for_previous()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one; their results are not used.
    x_rows = normed_x + tl.minimum(row, M - 1).to(tl.int64)[:, None] * H
    weight += tl.minimum(expert, ROWS - 1)[:, None] * H
    acc = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    for start in range(0, H, BLOCK_K):
        column = start + k[None, :]
        if H % BLOCK_K == 0:
            w, tokens = tl.load(weight + column), tl.load(x_rows + column)
        else:
            w = tl.load(weight + column, mask=column < H, other=0.0)
            tokens = tl.load(x_rows + column, mask=column < H, other=0.0)
        acc += dot(w, tl.trans(tokens), normed_x)
    at = logits + row.to(tl.int64)[:, None] * ROWS + expert[None, :]
    tl.store(at, tl.trans(acc), mask=(row < M)[:, None] & (expert < ROWS - 1)[None, :])


def moe_router(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    num_shared: int,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.moe_router` in two launches for a few rows, else three."""
    (m, hidden), experts = x.shape, weight.shape[0] - 1
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k {top_k} of {experts} experts: expected 1..{experts}")
    x, weight = x.contiguous(), weight.contiguous()
    normed_x = torch.empty_like(x)
    logits = x.new_empty((m, experts + 1), dtype=torch.float32)
    shape = {"ROWS": experts + 1, "H": hidden}
    norm = {"BLOCK_H": triton.next_power_of_2(hidden)}
    if is_decode(m):
        config = find_config("router_decode", tokens=m)
        grid = (cdiv(experts + 1, config["BLOCK_E"]), m)
        arguments = (x, norm_weight, weight, normed_x, logits, eps)
        launch(_decode_logits_kernel, grid, *arguments, **shape, **norm, **config)
    else:
        arguments = (x, norm_weight, weight.select(0, experts), normed_x, logits, eps)
        launch(_norm_gate_kernel, (m,), *arguments, **shape, **norm, num_warps=4)
        config = find_config("router_prefill", tokens=m)
        grid = (cdiv(m, config["BLOCK_M"]), cdiv(experts, config["BLOCK_E"]))
        launch(_prefill_logits_kernel, grid, normed_x, weight, logits, m, **shape, **config)
    topk_weights = x.new_empty((m, top_k + num_shared), dtype=torch.float32)
    topk_ids = x.new_empty((m, top_k + num_shared), dtype=torch.int32)
    launch(
        _choose_kernel,
        (m,),
        logits,
        num_tokens,
        topk_weights,
        topk_ids,
        EXPERTS=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        TOP_K=top_k,
        NUM_SHARED=num_shared,
        num_warps=1,
    )
    return normed_x, topk_weights, topk_ids
