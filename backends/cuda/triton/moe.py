"""Expert MLPs with INT4 weights; contracts in `et_moe.backends.ops.moe`."""

import torch

from et_moe.backends.cuda.triton.moe_decode import moe_decode
from et_moe.backends.cuda.triton.moe_prefill import moe_prefill
from et_moe.backends.cuda.triton.prepack import PREPACK_VERSION, prepack_experts

__all__ = ["PREPACK_VERSION", "moe_w4a8", "moe_w4a16", "prepack_experts"]

DECODE_TOKENS = 16
"""Up to this many tokens, pairs are computed one by one; from there on they are sorted by expert
and multiplied in blocks, which reads the weights of an expert once however many pairs it has."""


def _moe(int8, x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, group_size, residual):
    few = isinstance(x.shape[0], int) and x.shape[0] <= DECODE_TOKENS
    run = moe_decode if few else moe_prefill
    packed = (w13, w13_scale, w2, w2_scale)
    return run(x, *packed, topk_weights, topk_ids, group_size, residual, int8)


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
    """See `et_moe.backends.ops.moe_w4a8`; the weights are those of `prepack_experts`."""
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(True, x, *packed, topk_weights, topk_ids, group_size, residual)


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
    """See `et_moe.backends.ops.moe_w4a16`; the weights are those of `prepack_experts`."""
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(False, x, *packed, topk_weights, topk_ids, group_size, residual)
