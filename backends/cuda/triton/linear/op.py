"""Linear layers with INT4 or INT8 weights.

Activations of 8 and of 16 bits take part in the same integer arithmetic, rescaled into fp32 once
per step along K. Per tile of 128 columns (`ACTIVATION_TILE`), a row is quantized to INT8, or to 15
bits, which are two INT8 planes (`row_quantization.py`).
"""

import torch

from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.linear.decode import linear_decode, supports_k
from et_moe.backends.cuda.triton.linear.decode_loop import linear_decode_loop, supports_loop
from et_moe.backends.cuda.triton.linear.decode_rows import linear_decode_rows, supports_rows
from et_moe.backends.cuda.triton.linear.few_rows import linear_few_rows, supports_few_rows
from et_moe.backends.cuda.triton.linear.layout import nibble_distance
from et_moe.backends.cuda.triton.linear.prefill import linear_prefill
from et_moe.backends.cuda.triton.tuning import find_largest
from et_moe.backends.ops import GROUP_SIZES


def _check_weight(weight, scale, group_size, k: int) -> None:
    (n, row_bytes), shape = weight.shape, tuple(scale.shape)
    found = f"weight {tuple(weight.shape)} and scale {shape} are not what"
    if group_size is None:
        if row_bytes != k or shape != (n, 1):
            raise ValueError(f"{found} quantize_w8 makes for x of {k} columns")
        return
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, expected one of {GROUP_SIZES}")
    steps = row_bytes // min(nibble_distance(2 * row_bytes), group_size)
    pairs = (steps, n, 2) if scale.dtype == torch.float16 else (steps, n)
    if 2 * row_bytes != k + -k % 64 or shape != pairs:
        raise ValueError(
            f"{found} prepack_linear makes for x of {k} columns and group_size {group_size}"
        )


def check_norm_and_residual(n: int, k: int, norm_weight, residual) -> None:
    """Raises ValueError unless these fit a weight of n rows and k columns."""
    if norm_weight is not None and tuple(norm_weight.shape) != (k,):
        raise ValueError(f"norm_weight has shape {tuple(norm_weight.shape)}, expected {(k,)}")
    if residual is not None and residual.shape[1] != n:
        raise ValueError(f"residual has {residual.shape[1]} columns, expected {n}")


def check_linear(x, weight, scale, group_size, norm_weight, residual) -> None:
    """Raises ValueError unless the arguments of a linear op fit each other; group_size is None for
    INT8 weights."""
    n, k = weight.shape[0], x.shape[1]
    _check_weight(weight, scale, group_size, k)
    check_norm_and_residual(n, k, norm_weight, residual)


def takes_loop(x, weight, group_size, planes) -> bool:
    """Whether `linear_decode_loop` multiplies the rows of x, as `linear` takes its arguments."""
    n, bits = weight.shape[0], 8 if group_size is None else 4
    return find_largest(x.shape[0]) <= LINEAR_ROWS and supports_loop(n, x.shape[1], bits, planes)


def linear(x, weight, scale, group_size, norm_weight, eps, residual, planes) -> torch.Tensor:
    """The op for weights of `group_size`, None for INT8, and activations of so many INT8 planes;
    the other arguments are those of `linear_w4a8`."""
    check_linear(x, weight, scale, group_size, norm_weight, residual)
    arguments = (x.contiguous(), weight, scale, group_size, norm_weight, eps, residual, planes)
    if is_one(x.shape[0]) and supports_k(x.shape[1]):
        return linear_decode(*arguments)
    if takes_loop(x, weight, group_size, planes):
        return linear_decode_loop(*arguments[:-1])
    rows, bits = find_largest(x.shape[0]), 8 if group_size is None else 4
    if rows <= LINEAR_ROWS and supports_rows(weight.shape[0], x.shape[1], rows, bits):
        return linear_decode_rows(*arguments, rows)
    if supports_few_rows(weight.shape[0], x.shape[1], rows, group_size, planes):
        return linear_few_rows(*arguments[:-1], rows)
    return linear_prefill(*arguments)


def linear_w4a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w4a8` in one launch for a single row with K as in `supports_k`, else in two.

    Args:
        x: `[T, K]`, bf16 or fp32; norm_weight `[K]`, and residual `[T, N]` contiguous.
        weight, scale: `uint8 [N, K'/2]` and `int32 [steps, N]` or `float16 [steps, N, 2]`, as from
            `prepack_linear`.

    Returns:
        `[T, N]` in x's dtype.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    return linear(x, weight, scale, group_size, norm_weight, eps, residual, planes=1)


def linear_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w4a16` with the arguments, result and errors of `linear_w4a8`.

    Activations take part with 15 bits per tile of 128 columns.
    """
    return linear(x, weight, scale, group_size, norm_weight, eps, residual, planes=2)


def linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w8a8` in one launch for a single row with K as in `supports_k`, else in two.

    Args:
        x: `[T, K]`, bf16 or fp32; norm_weight `[K]`, and residual `[T, N]` contiguous.
        weight, scale: `int8 [N, K]` and `bfloat16 [N, 1]`, as in a bundle.

    Returns:
        `[T, N]` in x's dtype.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    return linear(x, weight, scale, None, norm_weight, eps, residual, planes=1)


def linear_w8a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w8a16` with the arguments, result and errors of `linear_w8a8`.

    Activations take part with 15 bits per tile of 128 columns.
    """
    return linear(x, weight, scale, None, norm_weight, eps, residual, planes=2)
