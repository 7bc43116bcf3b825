"""Attention or a gated delta net, and the linear layer behind it.

For 5 to 16 rows the last kernel of the first quantizes its rows for the second, which spares a
launch of 1.5 us. All else is as from the two, and so are the bits, but that attention adds up the
splits of a cache in the order for a tile of columns (`combine_kernel`).
"""

from collections.abc import Callable

import torch

from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.common.quantized_rows import QuantizedRows, RowFormat
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.gated_delta_net.op import (
    gated_delta_net,
    gated_delta_net_projected,
)
from et_moe.backends.cuda.triton.linear.few_rows import multiply_few_rows, supports_few_rows
from et_moe.backends.cuda.triton.linear.op import check_linear, linear
from et_moe.backends.cuda.triton.tuning import find_largest


def _run(
    function: Callable,
    given: dict,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`function(**given)`, of as many rows as `rows` has, and the linear layer behind it."""
    (n, row_bytes), bits = weight.shape, 8 if group_size is None else 4
    most, columns = find_largest(rows.shape[0]), row_bytes * (8 // bits)
    wanted = None
    if most > LINEAR_ROWS and supports_few_rows(n, columns, most, group_size, planes=1):
        wanted = RowFormat.of_weights(most, bits)
    x = function(**given, wanted=wanted)
    if not isinstance(x, QuantizedRows):
        return linear(x, weight, scale, group_size, None, 0.0, residual, planes=1)
    check_linear(x.q, weight, scale, group_size, None, residual)
    return multiply_few_rows(x, rows.shape[0], rows.dtype, weight, scale, bits, residual)


def attention_out(given: dict, **layer) -> torch.Tensor:
    """`attention(**given)` and the linear layer behind it.

    Args:
        layer: weight, scale, group_size (None for INT8 weights) and residual, as `linear_w4a8` and
            `linear_w8a8` take them.

    Returns:
        `[B R, N]` in the dtype of qkv.

    Raises:
        ValueError: as of the two ops.
    """
    return _run(attention, given, given["qkv"], **layer)


def gated_delta_net_out(given: dict, **layer) -> torch.Tensor:
    """`gated_delta_net(**given)` and the linear layer behind it, as `attention_out`."""
    return _run(gated_delta_net, given, given["projected"], **layer)


def gated_delta_net_projected_out(given: dict, **layer) -> torch.Tensor:
    """`gated_delta_net_projected(**given)` and the linear layer behind it, as `attention_out`."""
    return _run(gated_delta_net_projected, given, given["x"], **layer)
