"""The router of the mixture of experts; the contract is `ops.moe_router`.

A few rows: logits over many programs, each of which norms the row anew, then one program per row
that chooses. Many rows: the norm and the shared expert's gate row by row, then tiles of tokens
that take the logits of all experts on tensor cores and choose at once.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.compile_case import CompileCase
from et_moe.backends.cuda.triton.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.dot import dot
from et_moe.backends.cuda.triton.launch import cdiv, launch
from et_moe.backends.cuda.triton.row_quantization import normed
from et_moe.backends.cuda.triton.tuning import tuned

MAX_DECODE_TOKENS = 16


@triton.jit
def _flip(bits):
    """The bits of a float, as integers that have the order of floats; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _choose(
    logits,
    gate,
    row,
    valid,
    inside,
    topk_weights,
    topk_ids,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
):
    """Top-k and softmax over its logits; writes all slots of some rows.

    logits: fp32 `[R, E']`, of which those from EXPERTS on are not read. gate: fp32 `[R]`, before
    the sigmoid.
    row: int `[R]`; valid: whether it is a token and not padding; inside: whether it exists.
    """
    SLOTS: tl.constexpr = TOP_K + NUM_SHARED
    slot = tl.arange(0, triton.next_power_of_2(SLOTS))[None, :]
    BLOCK_E: tl.constexpr = logits.shape[1]
    LEAST: tl.constexpr = -0x80000000
    expert = tl.arange(0, BLOCK_E)[None, :]
    # Integers, of which a warp finds the largest in one instruction: NaNs come first, whatever
    # their sign, and adding 0 makes equals of zeros.
    keys = tl.where(logits == logits, _flip((logits + 0.0).to(tl.int32, bitcast=True)), 0x7FFFFFFF)
    keys = tl.where(expert < EXPERTS, keys, LEAST)
    ids = tl.where(slot < SLOTS, EXPERTS + slot - TOP_K, 0) + tl.zeros_like(row)[:, None]
    best_keys = tl.full((row.shape[0], slot.shape[1]), LEAST, tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1, keep_dims=True)
        chosen = tl.min(tl.where(keys == best, expert, BLOCK_E), axis=1, keep_dims=True)
        keys = tl.where(expert == chosen, LEAST, keys)
        ids = tl.where(slot == i, chosen, ids)
        best_keys = tl.where(slot == i, best, best_keys)
        if i == 0:
            largest = _flip(best).to(tl.float32, bitcast=True)
    weights = tl.exp(_flip(best_keys).to(tl.float32, bitcast=True) - largest)
    weights = tl.where(slot < TOP_K, weights, 0.0)
    weights /= tl.sum(weights, axis=1, keep_dims=True)
    shared = 1.0 / (1.0 + tl.exp(-gate))
    weights = tl.where(slot < TOP_K, weights, shared[:, None])
    at = row.to(tl.int64)[:, None] * SLOTS + slot
    mask = inside[:, None] & (slot < SLOTS)
    tl.store(topk_weights + at, tl.where(valid[:, None], weights, 0.0), mask=mask)
    tl.store(topk_ids + at, tl.where(valid[:, None], ids, -1), mask=mask)


@triton.jit
def _normed_row(x, gain, row, eps, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Row of x after RMSNorm with the weights `gain [BLOCK_H]`: fp32 `[BLOCK_H]`, zero from H."""
    column = tl.arange(0, BLOCK_H)
    value = tl.load(x + row.to(tl.int64) * H + column, mask=column < H, other=0.0).to(tl.float32)
    return normed(value, gain, tl.sum(value * value, axis=0) / H, eps, x.dtype.element_ty)


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
    """Slots of one token from logits `[M, EXPERTS + 1]`."""
    wait_for_previous()
    row = tl.program_id(0) + tl.arange(0, 1)
    expert = tl.arange(0, BLOCK_E)[None, :]
    at = logits + row[:, None] * (EXPERTS + 1)
    values = tl.load(at + expert, mask=expert < EXPERTS)
    gate = tl.load(logits + row * (EXPERTS + 1) + EXPERTS)
    valid = row >= 0
    if num_tokens is not None:
        valid = row < tl.load(num_tokens)
    _choose(values, gate, row, valid, row >= 0, topk_weights, topk_ids, EXPERTS, TOP_K, NUM_SHARED)


@triton.jit
def _norm_gate_kernel(
    x,
    norm_weight,
    gate_weight,
    normed_x,
    gate,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """normed_x `[M, H]` and the shared expert's logit gate `[M]`, one row per program."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    w = tl.load(gate_weight + column, mask=column < H, other=0.0).to(tl.float32)
    wait_for_previous()
    value = _normed_row(x, gain, row, eps, H, BLOCK_H)
    at = normed_x + row.to(tl.int64) * H + column
    tl.store(at, value.to(x.dtype.element_ty), mask=column < H)
    tl.store(gate + row, tl.sum(w * value, axis=0))


@triton.jit
def _prefill_kernel(
    normed_x,
    weight,
    gate,
    num_tokens,
    topk_weights,
    topk_ids,
    M,
    H: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of all experts for BLOCK_M tokens, and their slots."""
    wait_for_previous()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one; their results are not used.
    x_rows = normed_x + tl.minimum(row, M - 1).to(tl.int64)[:, None] * H
    weight += tl.minimum(expert, EXPERTS)[:, None] * H
    acc = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    for start in range(0, H, BLOCK_K):
        column = start + k[None, :]
        if H % BLOCK_K == 0:
            w, tokens = tl.load(weight + column), tl.load(x_rows + column)
        else:
            w = tl.load(weight + column, mask=column < H, other=0.0)
            tokens = tl.load(x_rows + column, mask=column < H, other=0.0)
        acc += dot(w, tl.trans(tokens), normed_x)
    logits = tl.trans(acc)
    inside = row < M
    valid = inside
    if num_tokens is not None:
        valid = row < tl.load(num_tokens)
    shared = tl.load(gate + row, mask=inside, other=0.0)
    _choose(logits, shared, row, valid, inside, topk_weights, topk_ids, EXPERTS, TOP_K, NUM_SHARED)


def moe_router(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    num_shared: int,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.moe_router` in two launches."""
    (m, hidden), experts = x.shape, weight.shape[0] - 1
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k {top_k} of {experts} experts: expected 1..{experts}")
    x, weight = x.contiguous(), weight.contiguous()
    normed_x = torch.empty_like(x)
    topk_weights = x.new_empty((m, top_k + num_shared), dtype=torch.float32)
    topk_ids = x.new_empty((m, top_k + num_shared), dtype=torch.int32)
    block_h = triton.next_power_of_2(hidden)
    choice = {
        "EXPERTS": experts,
        "BLOCK_E": triton.next_power_of_2(experts),
        "TOP_K": top_k,
        "NUM_SHARED": num_shared,
    }
    if isinstance(m, int) and m <= MAX_DECODE_TOKENS:
        config = tuned("router_decode", m)
        logits = x.new_empty((m, experts + 1), dtype=torch.float32)
        launch(
            _decode_logits_kernel,
            (cdiv(experts + 1, config["BLOCK_E"]), m),
            x,
            norm_weight,
            weight,
            normed_x,
            logits,
            eps,
            ROWS=experts + 1,
            H=hidden,
            BLOCK_H=block_h,
            **config,
        )
        slots = (logits, num_tokens, topk_weights, topk_ids)
        launch(_choose_kernel, (m,), *slots, **choice, num_warps=1)
        return normed_x, topk_weights, topk_ids
    config = tuned("router_prefill", m)
    gate = x.new_empty((m,), dtype=torch.float32)
    launch(
        _norm_gate_kernel,
        (m,),
        x,
        norm_weight,
        weight.select(0, experts),
        normed_x,
        gate,
        eps,
        H=hidden,
        BLOCK_H=block_h,
        num_warps=4,
    )
    launch(
        _prefill_kernel,
        (cdiv(m, config["BLOCK_M"]),),
        normed_x,
        weight,
        gate,
        num_tokens,
        topk_weights,
        topk_ids,
        m,
        H=hidden,
        **choice,
        **config,
    )
    return normed_x, topk_weights, topk_ids


def compile_cases() -> list[CompileCase]:
    """The router of Qwen3.5-35B-A3B: 256 experts of which 8, and one shared expert."""

    def arguments(m, device):
        def bf16(*shape):
            return torch.randn(shape, dtype=torch.bfloat16, device=device)

        return {
            "x": bf16(m, 2048),
            "norm_weight": bf16(2048) * 0.1,
            "weight": bf16(257, 2048) * 0.02,
            "top_k": 8,
            "num_shared": 1,
            "num_tokens": None if m == 1 else torch.full((1,), m, device=device),
        }

    return [
        CompileCase(
            "moe_router",
            moe_router,
            arguments,
            tables=("router_decode", "router_prefill"),
            streams={"_decode_logits_kernel": ("weight",), "_prefill_kernel": ("weight",)},
        )
    ]


def tune_candidates() -> dict[str, list[dict]]:
    """Configurations worth trying, by tuning table."""
    return {
        "router_decode": [
            {"BLOCK_E": e, "num_warps": w, "num_stages": 1} for e in (1, 2, 4) for w in (2, 4, 8)
        ],
        "router_prefill": [
            {"BLOCK_M": m, "BLOCK_K": k, "num_warps": w, "num_stages": s}
            for m in (16, 32, 64)
            for k in (32, 64)
            for w in (4, 8)
            for s in (2, 3, 4)
        ],
    }
