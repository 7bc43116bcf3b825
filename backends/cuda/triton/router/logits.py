"""RMSNorm and logits of the router, for a few tokens and for many."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _norm_row(x, gain, row, eps, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """A row of x `[T, H]` after RMSNorm with weight gain: fp32 `[BLOCK_H]`, zero from H on."""
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
    """Logits, fp32 `[T, ROWS]`, of one token and BLOCK_E rows of weight `[ROWS, H]`.

    The first program of a token also writes the token's row of normed_x `[T, H]`.
    """
    row = tl.program_id(1)
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_H)
    mask = (expert < ROWS)[:, None] & (column < H)[None, :]
    # The weights are on their way before x exists.
    w = tl.load(weight + expert[:, None] * H + column[None, :], mask=mask, other=0.0)
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    wait_for_previous()
    value = _norm_row(x, gain, row, eps, H, BLOCK_H)
    result = tl.sum(w.to(tl.float32) * value[None, :], axis=1)
    tl.store(logits + row * ROWS + expert, result, mask=expert < ROWS)
    if tl.program_id(0) == 0:
        at = normed_x + row.to(tl.int64) * H + column
        tl.store(at, value.to(x.dtype.element_ty), mask=column < H)


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
    """One token's row of normed_x `[T, H]`, and the gate's logit, the last of fp32 `[T, ROWS]`."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)
    gain = tl.load(norm_weight + column, mask=column < H, other=0.0)
    w = tl.load(gate_weight + column, mask=column < H, other=0.0).to(tl.float32)
    wait_for_previous()
    value = _norm_row(x, gain, row, eps, H, BLOCK_H)
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
    """Logits, fp32 `[M, ROWS]`, of BLOCK_M tokens and BLOCK_E experts.

    The experts are all but the last row of weight `[ROWS, H]`.
    """
    wait_for_previous()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end are read as the last one; their results are not stored.
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


def _empty_outputs(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    return torch.empty_like(x), logits


def compute_decode_logits(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm and logits of up to `DECODE_TOKENS` tokens, in one launch.

    Args:
        x, norm_weight, weight, eps: as `ops.moe_router` takes them; contiguous.

    Returns:
        x normed, `[T, H]` in x's dtype, and logits `float32 [T, E + 1]`, the gate's last.
    """
    (m, hidden), rows = x.shape, weight.shape[0]
    normed_x, logits = _empty_outputs(x, weight)
    # Not by the number of tokens: a row gets the same bits beside any number of others.
    config = find_config("router_decode", hidden=hidden)
    launch(
        _decode_logits_kernel,
        (cdiv(rows, config["BLOCK_E"]), m),
        x,
        norm_weight,
        weight,
        normed_x,
        logits,
        eps,
        ROWS=rows,
        H=hidden,
        BLOCK_H=triton.next_power_of_2(hidden),
        **config,
    )
    return normed_x, logits


def compute_prefill_logits(
    x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `compute_decode_logits`, for any number of tokens, in two launches."""
    (m, hidden), rows = x.shape, weight.shape[0]
    normed_x, logits = _empty_outputs(x, weight)
    shape = {"ROWS": rows, "H": hidden}
    launch(
        _norm_gate_kernel,
        (m,),
        x,
        norm_weight,
        weight.select(0, rows - 1),
        normed_x,
        logits,
        eps,
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=4,
        **shape,
    )
    config = find_config("router_prefill", tokens=m)
    grid = (cdiv(m, config["BLOCK_M"]), cdiv(rows - 1, config["BLOCK_E"]))
    launch(_prefill_logits_kernel, grid, normed_x, weight, logits, m, **shape, **config)
    return normed_x, logits
