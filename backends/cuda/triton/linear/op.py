"""Linear layers with INT4 weights; contracts in `et_moe.backends.ops.linear`.

W4A8 and W4A16 are the same integer arithmetic, rescaled into fp32 once per K-step. W4A8 quantizes a
row to INT8 in tiles of 128 columns (`ACTIVATION_TILE`), W4A16 to 15 bits, as two INT8 planes (see
`row_quantization`).
"""

import torch

from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.linear.decode import linear_decode, supports_k
from et_moe.backends.cuda.triton.linear.layout import half_block
from et_moe.backends.cuda.triton.linear.prefill import linear_prefill
from et_moe.backends.ops import GROUP_SIZES


def check_linear(x, weight, scale, group_size, norm_weight, residual) -> None:
    """Raises ValueError unless the arguments of `linear_w4a8` or `linear_w4a16` fit each other."""
    (n, packed), k = weight.shape, x.shape[1]
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, expected one of {GROUP_SIZES}")
    steps = packed // min(half_block(2 * packed), group_size)
    if 2 * packed != k + -k % 64 or tuple(scale.shape) != (steps, n):
        raise ValueError(
            f"weight {tuple(weight.shape)} and scale {tuple(scale.shape)} are not what "
            f"prepack_linear makes for x of {k} columns and group_size {group_size}"
        )
    if norm_weight is not None and tuple(norm_weight.shape) != (k,):
        raise ValueError(f"norm_weight has shape {tuple(norm_weight.shape)}, expected {(k,)}")
    if residual is not None and residual.shape[1] != n:
        raise ValueError(f"residual has {residual.shape[1]} columns, expected {n}")


def _linear(x, weight, scale, group_size, norm_weight, eps, residual, planes) -> torch.Tensor:
    check_linear(x, weight, scale, group_size, norm_weight, residual)
    x = x.contiguous()
    if is_one(x.shape[0]) and supports_k(x.shape[1]):
        return linear_decode(x, weight, scale, group_size, norm_weight, eps, residual, planes)
    return linear_prefill(x, weight, scale, group_size, norm_weight, eps, residual, planes)


def linear_w4a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w4a8` with weight and scale as from `prepack_linear`; `[T, N]` in x's dtype.

    One launch for one row (K a multiple of 256 and K / 256 a power of two), else two.
    """
    return _linear(x, weight, scale, group_size, norm_weight, eps, residual, planes=1)


def linear_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w4a16`, likewise; x takes part with 15 bits per tile of 128 columns."""
    return _linear(x, weight, scale, group_size, norm_weight, eps, residual, planes=2)
