"""The sparse mixture of experts: router and expert MLPs.

An expert e computes w2[e] (silu(gate) * up) with [gate | up] = w13[e] x. The shared expert rides
along as further experts (ids E, E+1, ...) of the same width, weighted by its sigmoid gate, so one
grouped GEMM serves all. Where it is stored in another way the tables end at E, its slots are
skipped, and it is computed of its own.
"""

import functools

import torch

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.linear import rms_norm
from et_moe.backends.ops.quantization import (
    ACTIVATION_TILE,
    dequantize_w4,
    dequantize_w8,
    expert_activation_tile,
    matmul_w4a8,
    matmul_w8a8,
    quantize_int8,
)
from et_moe.backends.ops.sequences import is_padding


def _moe_router_fake(
    x, norm_weight, weight, top_k, num_shared, eps=1e-6, num_tokens=None, normalize=True
):
    slots = (x.shape[0], top_k + num_shared)
    return (
        torch.empty_like(x),
        x.new_empty(slots, dtype=torch.float32),
        x.new_empty(slots, dtype=torch.int32),
    )


@declare(_moe_router_fake)
def moe_router(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    num_shared: int,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm, router logits, top-k, softmax, and the shared expert's gate.

    The routed weights are those of Hugging Face's `Qwen3NextTopKRouter`: the softmax over all
    experts at the top-k, divided by their sum if `normalize`, which is the softmax over these
    alone. Experts are chosen by logit, which tells them apart where their probabilities are equal.

    Args:
        x: float `[T, H]`, before the norm.
        norm_weight: float `[H]`, zero-centred.
        weight: float `[E + 1, H]`: the router's rows, and last the shared expert's gate.
        top_k: routed experts per token.
        num_shared: how many experts of the tables the shared expert occupies (ids from E on).
        num_tokens: `int64 [B]` or None: how many of each sequence's T / B rows are valid, see
            `sequences.py`.
        normalize: whether the routed weights of a token add up to 1 (`norm_topk_prob` of a
            Hugging Face configuration).

    Returns:
        x normed `[T, H]` (x's dtype); topk_weights `float32 [T, top_k + num_shared]`, routed first,
        in order of falling logit (NaNs before all others; ties: lower id first), then
        sigmoid(shared gate) num_shared times; topk_ids `int32` of the same shape. Padding rows have
        id -1 and weight 0.
    """
    normed = rms_norm(x, norm_weight, eps)
    logits = normed.float() @ weight.float().T
    experts = weight.shape[0] - 1
    values, ids = logits[:, :experts].sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_k], ids[:, :top_k]
    routed = values.softmax(-1) if normalize else logits[:, :experts].softmax(-1).gather(1, ids)
    shared_ids = torch.arange(experts, experts + num_shared, device=x.device)
    shared = logits[:, experts:].sigmoid().expand(-1, num_shared)
    weights = torch.cat((routed, shared), dim=-1)
    ids = torch.cat((ids, shared_ids.expand(x.shape[0], -1)), dim=-1)
    if num_tokens is not None:
        padding = is_padding(x.shape[0], num_tokens)[:, None]
        weights, ids = weights.masked_fill(padding, 0.0), ids.masked_fill(padding, -1)
    return normed, weights, ids.to(torch.int32)


def _sum_experts(x, topk_weights, topk_ids, residual, experts, expert) -> torch.Tensor:
    """Sums weight * expert(rows, id) over each row's slots in fp32; ids outside of 0..experts-1
    are skipped."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in topk_ids.unique().tolist():
        if not 0 <= e < experts:
            continue
        rows, slots = (topk_ids == e).nonzero(as_tuple=True)
        out.index_add_(0, rows, expert(rows, e) * topk_weights[rows, slots, None].float())
    return (out if residual is None else out + residual.float()).to(x.dtype)


def _quantized_expert(x, multiply, w13, w2):
    """An expert for `_sum_experts` that quantizes the activations in front of both products.

    Args:
        multiply: `(q, scale, tile, values, scales) -> float32 [M, N]`, with those of one expert.
        w13, w2: the tables' values and scales.
    """
    q, scale = quantize_int8(x, ACTIVATION_TILE)
    tile = expert_activation_tile(w13[0].shape[1] // 2)

    def expert(rows, e):
        hidden = multiply(q[rows], scale[rows], ACTIVATION_TILE, *(t[e] for t in w13))
        gate, up = hidden.chunk(2, dim=-1)
        inner = quantize_int8(torch.nn.functional.silu(gate) * up, tile)
        return multiply(*inner, tile, *(t[e] for t in w2))

    return expert


def _rounding_expert(x, dequantize, w13, w2):
    """An expert for `_sum_experts` that rounds silu(gate) * up to x's dtype.

    Args:
        dequantize: `(values, scales) -> float32 [N, K]`, with those of one expert.
        w13, w2: the tables' values and scales.
    """

    def expert(rows, e):
        hidden = x[rows].float() @ dequantize(*(t[e] for t in w13)).T
        gate, up = hidden.chunk(2, dim=-1)
        activated = (torch.nn.functional.silu(gate) * up).to(x.dtype).float()
        return activated @ dequantize(*(t[e] for t in w2)).T

    return expert


def _moe_fake(x, w13, w2, topk_weights, topk_ids, residual=None):
    return torch.empty_like(x)


@declare(_moe_fake)
def moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expert MLPs with float weights, for models exported without quantization.

    Args:
        x: float `[T, H]`, normed.
        w13: float `[E, 2I, H]`, rows [gate | up]; w2: float `[E, H, I]`.
        topk_weights: float `[T, S]`; topk_ids: int32 or int64 `[T, S]`. A slot whose id is outside
            of 0..E-1 is skipped.
        residual: `[T, H]` or None.

    Returns:
        `[T, H]` in x's dtype: the weighted sum over slots, plus the residual.
    """

    def expert(rows, e):
        gate, up = (x[rows].float() @ w13[e].float().T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ w2[e].float().T

    return _sum_experts(x, topk_weights, topk_ids, residual, len(w13), expert)


def _moe_w4_fake(
    x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, group_size, residual=None
):
    return torch.empty_like(x)


@declare(_moe_w4_fake)
def moe_w4a8(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expert MLPs with INT4 weights and INT8 activations.

    Tokens are quantized once in tiles of `ACTIVATION_TILE`; silu(gate) * up, in fp32, is quantized
    in tiles of `expert_activation_tile(I)`. See `matmul_w4a8` for the arithmetic.

    Args:
        x: float `[T, H]`, normed.
        w13: `uint8 [E, 2I, H/2]`, rows [gate | up]; w13_scale: `[E, 2I, H/group_size]`.
        w2: `uint8 [E, H, I/2]`; w2_scale: `[E, H, I/group_size]`. Scales are bfloat16 or float16.
        topk_weights, topk_ids, residual: as in `moe`.

    Returns:
        `[T, H]` in x's dtype.
    """
    multiply = functools.partial(matmul_w4a8, group_size=group_size)
    expert = _quantized_expert(x, multiply, (w13, w13_scale), (w2, w2_scale))
    return _sum_experts(x, topk_weights, topk_ids, residual, len(w13), expert)


@declare(_moe_w4_fake)
def moe_w4a16(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moe_w4a8` with activations left in x's dtype (silu(gate) * up is rounded to it too)."""
    dequantize = functools.partial(dequantize_w4, group_size=group_size)
    expert = _rounding_expert(x, dequantize, (w13, w13_scale), (w2, w2_scale))
    return _sum_experts(x, topk_weights, topk_ids, residual, len(w13), expert)


def _moe_w8_fake(x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, residual=None):
    return torch.empty_like(x)


@declare(_moe_w8_fake)
def moe_w8a8(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Expert MLPs with INT8 weights and INT8 activations, quantized as in `moe_w4a8`.

    See `matmul_w8a8` for the arithmetic.

    Args:
        x: float `[T, H]`, normed.
        w13: `int8 [E, 2I, H]`, rows [gate | up]; w13_scale: `bfloat16 [E, 2I, 1]`.
        w2: `int8 [E, H, I]`; w2_scale: `bfloat16 [E, H, 1]`.
        topk_weights, topk_ids, residual: as in `moe`.

    Returns:
        `[T, H]` in x's dtype.
    """
    expert = _quantized_expert(x, matmul_w8a8, (w13, w13_scale), (w2, w2_scale))
    return _sum_experts(x, topk_weights, topk_ids, residual, len(w13), expert)


@declare(_moe_w8_fake)
def moe_w8a16(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moe_w8a8` with activations left in x's dtype (silu(gate) * up is rounded to it too)."""
    expert = _rounding_expert(x, dequantize_w8, (w13, w13_scale), (w2, w2_scale))
    return _sum_experts(x, topk_weights, topk_ids, residual, len(w13), expert)
