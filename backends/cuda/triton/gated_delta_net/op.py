"""The gated delta net: one token in a single step, a prompt in chunks of tokens."""

import torch

from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.common.tokens import has_one_row_each
from et_moe.backends.cuda.triton.gated_delta_net.chunk import chunk_gated_delta
from et_moe.backends.cuda.triton.gated_delta_net.gates import Gating
from et_moe.backends.cuda.triton.gated_delta_net.step import step_gated_delta
from et_moe.backends.cuda.triton.linear.decode import linear_decode
from et_moe.backends.cuda.triton.linear.op import check_linear


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.gated_delta_rule` in one launch for one token of each sequence, else in two.

    Either B or R is 1. Dk and Dv are powers of two from 16 on; q, k and v are contiguous, bf16 or
    fp32.

    Returns:
        `[B R, Hv, Dv]` in v's dtype.

    Raises:
        ValueError: several sequences have another number of rows than one each.
    """
    one_each = has_one_row_each(v.shape[0], slots.shape[0])
    run = step_gated_delta if one_each else chunk_gated_delta
    return run((q, k, v), (0, 0), (g, beta), state, slots, num_tokens, q.shape[1]).view(v.shape)


def _behind_convolution(
    qkv: torch.Tensor,
    channels: int,
    gating: Gating,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """All that `gated_delta_net` does behind its convolution, whose results are the first channels
    of the rows of qkv."""
    _, heads, key_dim, value_dim = state.shape
    keys = (channels - heads * value_dim) // 2
    columns, key_heads = (keys, 2 * keys), keys // key_dim
    one_each = has_one_row_each(qkv.shape[0], slots.shape[0])
    run = step_gated_delta if one_each else chunk_gated_delta
    return run((qkv, qkv, qkv), columns, gating, state, slots, num_tokens, key_heads)


def gated_delta_net(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    slots: torch.Tensor,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.gated_delta_net` in two launches for one token of each sequence, else in four.

    Either B or R is 1. Dk and Dv are powers of two from 16 on; all tensors are contiguous, floats
    bf16 or fp32.

    Returns:
        `[B R, V]` in projected's dtype. The outputs of padding are zeros.

    Raises:
        ValueError: several sequences have another number of rows than one each.
    """
    qkv = causal_conv1d(projected, conv_weight, conv_state, slots, num_tokens)
    gating, channels = Gating(projected, a_log, dt_bias, norm_weight, eps), conv_weight.shape[0]
    return _behind_convolution(qkv, channels, gating, recurrent_state, slots, num_tokens)


def gated_delta_net_projected(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    input_norm_weight: torch.Tensor | None,
    input_eps: float,
    planes: int,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    slots: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """A linear layer on one token and the `gated_delta_net` behind it, in two launches.

    The first launch is that of the linear layer, and computes the convolution as well. The result
    has the bits of the two ops.

    Args:
        x, weight, scale, group_size, input_norm_weight, input_eps: as `linear_w4a8` takes them for
            planes 1, or `linear_w4a16` for planes 2; with group_size None, as `linear_w8a8` and
            `linear_w8a16` take them. x is `[1, K]` with K as in `supports_k`.
        conv_weight, a_log, dt_bias, norm_weight, conv_state, recurrent_state, slots, eps: as
            `gated_delta_net` takes them.

    Returns:
        `[1, V]` in x's dtype, as from the two ops.

    Raises:
        ValueError: the projection's arguments do not fit each other.
    """
    check_linear(x, weight, scale, group_size, input_norm_weight, None)
    projected = linear_decode(
        x.contiguous(),
        weight,
        scale,
        group_size,
        input_norm_weight,
        input_eps,
        None,
        planes,
        (conv_weight, conv_state, slots),
    )
    gating, channels = Gating(projected, a_log, dt_bias, norm_weight, eps), conv_weight.shape[0]
    return _behind_convolution(projected, channels, gating, recurrent_state, slots, None)
