"""Linear layers with an RMSNorm fused in front and a residual add behind, the norm alone, and the
embedding.

`linear(x)` below stands for: x' = rms_norm(x, norm_weight) if norm_weight is given, else x;
y = x' W^T, accumulated in fp32; y + residual if given; rounded to x's dtype.
"""

import torch

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.quantization import (
    ACTIVATION_TILE,
    dequantize_w4,
    dequantize_w8,
    matmul_w4a8,
    matmul_w8a8,
    quantize_int8,
)


def _rms_norm_fake(x, weight, eps=1e-6):
    return torch.empty_like(x)


@declare(_rms_norm_fake)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Qwen3.5's RMSNorm: x * rsqrt(mean(x^2) + eps) * (1 + weight) in fp32, rounded to x's dtype.

    Args:
        x: float `[..., H]`; the kernels take `[T, H]`.
        weight: float `[H]`, zero-centred (zeros are the identity).

    Returns:
        A tensor like x.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


def _prologue(x: torch.Tensor, norm_weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if norm_weight is None else rms_norm(x, norm_weight, eps)


def _epilogue(y: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return (y if residual is None else y + residual.float()).to(x.dtype)


def _linear_fake(x, weight, norm_weight=None, eps=1e-6, residual=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


@declare(_linear_fake)
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with float weights, for models exported without quantization.

    Args:
        x: float `[T, K]`.
        weight: float `[N, K]`.
        norm_weight: float `[K]` or None; eps: of the norm.
        residual: float `[T, N]` or None.

    Returns:
        `[T, N]` in x's dtype.
    """
    return _epilogue(_prologue(x, norm_weight, eps).float() @ weight.float().T, x, residual)


def _linear_w4_fake(x, weight, scale, group_size, norm_weight=None, eps=1e-6, residual=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


@declare(_linear_w4_fake)
def linear_w4a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with INT4 weights and INT8 activations (tiles of `ACTIVATION_TILE`).

    Args:
        x: float `[T, K]`.
        weight: `uint8 [N, K/2]`, scale: `[N, K/group_size]`, bfloat16 or float16, as from
            `quantize_w4`.
        norm_weight, eps, residual: as in `linear`.

    Returns:
        `[T, N]` in x's dtype; see `matmul_w4a8` for the arithmetic.
    """
    q, q_scale = quantize_int8(_prologue(x, norm_weight, eps), ACTIVATION_TILE)
    y = matmul_w4a8(q, q_scale, ACTIVATION_TILE, weight, scale, group_size)
    return _epilogue(y, x, residual)


@declare(_linear_w4_fake)
def linear_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_w4a8` with activations left in x's dtype."""
    y = _prologue(x, norm_weight, eps).float() @ dequantize_w4(weight, scale, group_size).T
    return _epilogue(y, x, residual)


def _linear_w8_fake(x, weight, scale, norm_weight=None, eps=1e-6, residual=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


@declare(_linear_w8_fake)
def linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with INT8 weights and INT8 activations (tiles of `ACTIVATION_TILE`).

    Args:
        x: float `[T, K]`.
        weight: `int8 [N, K]`, scale: `bfloat16 [N, 1]`, as from `quantize_w8`.
        norm_weight, eps, residual: as in `linear`.

    Returns:
        `[T, N]` in x's dtype; see `matmul_w8a8` for the arithmetic.
    """
    q, q_scale = quantize_int8(_prologue(x, norm_weight, eps), ACTIVATION_TILE)
    return _epilogue(matmul_w8a8(q, q_scale, ACTIVATION_TILE, weight, scale), x, residual)


@declare(_linear_w8_fake)
def linear_w8a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_w8a8` with activations left in x's dtype."""
    y = _prologue(x, norm_weight, eps).float() @ dequantize_w8(weight, scale).T
    return _epilogue(y, x, residual)


def _embedding_w8_fake(ids, weight, scale, dtype):
    return torch.empty((ids.shape[0], weight.shape[1]), dtype=dtype, device=ids.device)


@declare(_embedding_w8_fake)
def embedding_w8(
    ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of an INT8 table.

    Args:
        ids: `int64 [T]`, each in 0..V-1 (checked).
        weight: `int8 [V, H]`; scale: `bfloat16 [V, 1]`, as from `quantize_w8`.
        dtype: of the result, float32 or bfloat16.

    Returns:
        `[T, H]`: weight[id] * scale[id].
    """
    return (weight[ids].float() * scale[ids].float()).to(dtype)


def _embedding_w4_fake(ids, weight, scale, group_size, dtype):
    return torch.empty((ids.shape[0], 2 * weight.shape[1]), dtype=dtype, device=ids.device)


@declare(_embedding_w4_fake)
def embedding_w4(
    ids: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of an INT4 table.

    Args:
        ids: `int64 [T]`, each in 0..V-1 (checked).
        weight: `uint8 [V, H/2]`; scale: `[V, H/group_size]`, bfloat16 or float16, as from
            `quantize_w4`. The kernels take them as they are: a row is read by itself, so no other
            order would serve.
        group_size: columns that share a scale.
        dtype: of the result, float32 or bfloat16.

    Returns:
        `[T, H]`: each value times the scale of its group, which is exact in fp32.
    """
    return dequantize_w4(weight[ids], scale[ids], group_size).to(dtype)
