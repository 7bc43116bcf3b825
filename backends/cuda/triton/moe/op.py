"""Expert MLPs with INT4, INT8 or float weights.

The relative L2 error of `moe_w4a8`, with Gaussian inputs in bf16 (test_moe.py), is under 0.1%
against the eager reference, since all sums are fp32 and only the result is rounded. Against bf16
activations it is 1.2% to 1.48% over the tokens of a batch (a single token scatters by 0.1%), and
1.5% is the budget. INT8 tiles of 128 columns in front of GEMM 1 and of 64 in front of GEMM 2 are
the fastest within it. To halve a tile doubles the rescaling of int32 sums, and with tiles of 128
this takes as long as the matrix unit already. Experts up to 128 wide have tiles of 32 in front of
GEMM 2, see `expert_activation_tile`.
"""

import torch

from et_moe.backends.cuda.triton.common.tokens import is_decode
from et_moe.backends.cuda.triton.moe.decode import moe_decode
from et_moe.backends.cuda.triton.moe.few_tokens import moe_few_tokens, supports_few_tokens
from et_moe.backends.cuda.triton.moe.prefill import moe_prefill


def _moe(int8, x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, group_size, residual):
    packed = (w13, w13_scale, w2, w2_scale)
    decode = is_decode(x.shape[0])
    if decode and supports_few_tokens(x, int8):
        return moe_few_tokens(x, *packed, topk_weights, topk_ids, group_size, residual)
    run = moe_decode if decode else moe_prefill
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
    """`ops.moe_w4a8` in two launches for up to `DECODE_TOKENS` tokens, else in five.

    Args:
        x: `[T, H]`, bf16 or fp32; residual: `[T, H]` or None.
        w13, w13_scale, w2, w2_scale: as from `prepack_experts`.
        topk_weights: float `[T, S]`. topk_ids: int32 or int64 `[T, S]`; a slot whose id is outside
            of the table is skipped.

    Returns:
        `[T, H]` in x's dtype.
    """
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
    """`ops.moe_w4a16` with the arguments and result of `moe_w4a8`, in two launches or four."""
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(False, x, *packed, topk_weights, topk_ids, group_size, residual)


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
    """`ops.moe_w8a8` in as many launches as `moe_w4a8`.

    Args:
        w13, w13_scale, w2, w2_scale: as from `prepack_experts_w8`; the others as in `moe_w4a8`.

    Returns:
        `[T, H]` in x's dtype.
    """
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(True, x, *packed, topk_weights, topk_ids, None, residual)


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
    """`ops.moe_w8a16` with the arguments and result of `moe_w8a8`, in two launches or four."""
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(False, x, *packed, topk_weights, topk_ids, None, residual)


def moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.moe` in two launches or four; silu(gate) * up is rounded to x's dtype.

    Args:
        w13, w2: as from `prepack_experts_dense`, in bf16 or x's dtype; the others as in `moe_w4a8`.

    Returns:
        `[T, H]` in x's dtype.
    """
    return _moe(False, x, w13, None, w2, None, topk_weights, topk_ids, None, residual)
