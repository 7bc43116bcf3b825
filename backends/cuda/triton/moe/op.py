"""Expert MLPs with INT4 weights; contracts in `et_moe.backends.ops.moe`.

Error of `moe_w4a8`, relative L2, with Gaussian inputs in bf16 (test_moe.py): under 0.1% against the
eager reference, since all sums are fp32 and only the result is rounded; 1.2% to 1.48% against bf16
activations, over the tokens of a batch (a single token scatters by 0.1%), of a budget of 1.5%.
INT8 tiles of 128 columns in front of GEMM 1 and of 64 in front of GEMM 2 are the fastest within it:
halving a tile doubles the rescaling of int32 sums, which at 128 takes as long as the matrix unit.
Experts up to 128 wide take 32 in front of GEMM 2: see `expert_activation_tile`.
"""

import torch

from et_moe.backends.cuda.triton.common.tokens import is_decode
from et_moe.backends.cuda.triton.moe.decode import moe_decode
from et_moe.backends.cuda.triton.moe.prefill import moe_prefill


def _moe(int8, x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, group_size, residual):
    run = moe_decode if is_decode(x.shape[0]) else moe_prefill
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
