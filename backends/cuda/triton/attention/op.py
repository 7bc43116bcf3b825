"""Grouped-query attention with QK-norm, partial RoPE, KV cache and output gate."""

import math

import torch

from et_moe.backends.cuda.triton.attention.decode import attention_decode
from et_moe.backends.cuda.triton.attention.prefill import attention_prefill
from et_moe.backends.cuda.triton.common.quantized_rows import QuantizedRows, RowFormat
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS, count_decode_rows

MOST_ROWS = LINEAR_ROWS + 1
"""Of a sequence. The head for multi-token prediction has a row more than the model."""


def attention(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    inv_freq: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
    first_token: int = 0,
    each_row: bool = False,
    *,
    wanted: RowFormat | None = None,
) -> torch.Tensor | QuantizedRows:
    """`ops.attention`: `[B R, Hq * D]` in two launches, for D a power of two from 16 on.

    B or R is 1 or, with each_row, R is at most 5. With each_row, and for up to 64 rows of one
    sequence whose cache is large, it takes three launches. All tensors are contiguous; shapes and
    dtypes are those of the contract, floats bf16 or fp32. The outputs of padding are zeros. With
    `wanted`, the rows may be quantized for the linear layer behind, see `join_splits`.

    Raises:
        ValueError: sequences have other rows.
    """
    rows = count_decode_rows(qkv.shape[0], positions.shape[0], each_row, MOST_ROWS)
    _, kv_heads, _, dim = k_cache.shape
    heads = (qkv.shape[1] // dim - 2 * kv_heads) // 2
    inputs = (qkv, q_norm, k_norm, inv_freq, k_cache, v_cache, pages, positions)
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "HALF": inv_freq.shape[0],
        "MAX_PAGES": pages.shape[1],
        "EPS": eps,
        "SCALE_LOG2": dim**-0.5 * math.log2(math.e),
        "HAS_NUM_TOKENS": num_tokens is not None,
        "FIRST_TOKEN": first_token,
    }
    inputs = (*inputs, positions if num_tokens is None else num_tokens)
    if rows:
        return attention_decode(inputs, shape, rows, wanted)
    return attention_prefill(inputs, shape, wanted)
