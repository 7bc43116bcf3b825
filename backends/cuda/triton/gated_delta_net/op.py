"""The gated delta net: one token in a single step, a prompt in chunks of tokens."""

import torch

from et_moe.backends.cuda.triton.causal_conv1d.decode import count_conv_versions
from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.common.quantized_rows import QuantizedRows, RowFormat
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS, count_decode_rows
from et_moe.backends.cuda.triton.gated_delta_net.chunk import chunk_gated_delta
from et_moe.backends.cuda.triton.gated_delta_net.few_tokens import few_gated_delta
from et_moe.backends.cuda.triton.gated_delta_net.gates import Gating
from et_moe.backends.cuda.triton.gated_delta_net.places import StatePlaces
from et_moe.backends.cuda.triton.gated_delta_net.step import step_gated_delta
from et_moe.backends.cuda.triton.linear.decode import linear_decode, supports_k
from et_moe.backends.cuda.triton.linear.decode_loop import ConvRows, linear_decode_loop
from et_moe.backends.cuda.triton.linear.op import check_linear, linear, takes_loop
from et_moe.backends.cuda.triton.tuning import find_largest
from et_moe.backends.ops.sequences import check_each_row


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
    versions: torch.Tensor | None = None,
    each_row: bool = False,
) -> torch.Tensor:
    """`ops.gated_delta_rule` in one launch for one token of each sequence or, with each_row, up to
    four; for up to four tokens of one sequence in one, else in two.

    Else B is 1. Dk and Dv are powers of two from 16 on; q, k and v are contiguous, bf16 or fp32. A
    version below or above those that there are counts as the first or the last.

    Returns:
        `[B R, Hv, Dv]` in v's dtype.

    Raises:
        ValueError: sequences have other rows, or each_row without versions or with too few.
    """
    places = StatePlaces(state, slots, num_tokens, versions)
    return _run((q, k, v), (0, 0), (g, beta), places, each_row, q.shape[1]).view(v.shape)


def _run(
    qkv,
    columns,
    gates,
    places: StatePlaces,
    each_row: bool,
    key_heads: int,
    wanted: RowFormat | None = None,
) -> torch.Tensor | QuantizedRows:
    """The rule, by the kernels for as many rows, as from `step_gated_delta`."""
    rows = count_decode_rows(qkv[0].shape[0], places.slots.shape[0], each_row)
    check_each_row(each_row, rows, places.versions, places.count)
    if rows:
        return step_gated_delta(qkv, columns, gates, places, key_heads, rows, wanted)
    if find_largest(qkv[0].shape[0]) <= LINEAR_ROWS:
        return few_gated_delta(qkv, columns, gates, places, key_heads)
    return chunk_gated_delta(qkv, columns, gates, places, key_heads)


def _behind_convolution(
    qkv: torch.Tensor,
    channels: int,
    gating: Gating,
    places: StatePlaces,
    each_row: bool,
    wanted: RowFormat | None,
) -> torch.Tensor | QuantizedRows:
    """All that `gated_delta_net` does behind its convolution, whose results are the first channels
    of the rows of qkv."""
    heads, key_dim, value_dim = places.shape
    keys = (channels - heads * value_dim) // 2
    columns, key_heads = (keys, 2 * keys), keys // key_dim
    return _run((qkv, qkv, qkv), columns, gating, places, each_row, key_heads, wanted)


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
    versions: torch.Tensor | None = None,
    each_row: bool = False,
    *,
    wanted: RowFormat | None = None,
) -> torch.Tensor | QuantizedRows:
    """`ops.gated_delta_net` in two launches for one token of each sequence or, with each_row, up to
    four; for up to four tokens of one sequence in two, else in four.

    Else B is 1. Dk and Dv are powers of two from 16 on; all tensors are contiguous, floats bf16 or
    fp32. A version below or above those that there are counts as the first or the last.

    Returns:
        `[B R, V]` in projected's dtype, or these rows quantized, see `step_gated_delta`. The
        outputs of padding are zeros.

    Raises:
        ValueError: sequences have other rows, or each_row without versions or with too few.
    """
    where = (slots, num_tokens, versions)
    qkv = causal_conv1d(projected, conv_weight, conv_state, *where, each_row)
    gating, channels = Gating(projected, a_log, dt_bias, norm_weight, eps), conv_weight.shape[0]
    places = StatePlaces(recurrent_state, *where)
    return _behind_convolution(qkv, channels, gating, places, each_row, wanted)


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
    num_tokens: torch.Tensor | None = None,
    versions: torch.Tensor | None = None,
    each_row: bool = False,
    *,
    wanted: RowFormat | None = None,
) -> torch.Tensor | QuantizedRows:
    """A linear layer and the `gated_delta_net` behind it.

    They take two launches for a single token without `num_tokens`, and for up to `LINEAR_ROWS` rows
    that `gated_delta_net` takes two launches for, if `takes_loop`: the first is that of the linear
    layer, and computes the convolution as well. Else they take those of the two ops. The result has
    the bits of these.

    Args:
        x, weight, scale, group_size, input_norm_weight, input_eps: as `linear_w4a8` takes them for
            planes 1, or `linear_w4a16` for planes 2; with group_size None, as `linear_w8a8` and
            `linear_w8a16` take them.
        conv_weight, a_log, dt_bias, norm_weight, conv_state, recurrent_state, slots, eps,
            num_tokens, versions, each_row, wanted: as `gated_delta_net` takes them.

    Returns:
        `[B R, V]` in x's dtype, as from the two ops; or these rows quantized.

    Raises:
        ValueError: the projection's arguments do not fit each other, or as `gated_delta_net`.
    """
    check_linear(x, weight, scale, group_size, input_norm_weight, None)
    projection = (x.contiguous(), weight, scale, group_size, input_norm_weight, input_eps, None)
    layer = (a_log, dt_bias, norm_weight)
    rows = count_decode_rows(x.shape[0], slots.shape[0], each_row)
    check_each_row(each_row, rows, versions, count_conv_versions(conv_state, conv_weight.shape[1]))
    if is_one(x.shape[0]) and num_tokens is None and supports_k(x.shape[1]):
        conv = (conv_weight, conv_state, slots, versions)
        projected = linear_decode(*projection, planes, conv)
    elif rows and not is_one(x.shape[0]) and takes_loop(x, weight, group_size, planes):
        conv = ConvRows(conv_weight, conv_state, slots, versions, num_tokens, rows)
        projected = linear_decode_loop(*projection, conv)
    else:
        projected = linear(*projection, planes)
        net = (projected, conv_weight, *layer, conv_state, recurrent_state, slots, eps)
        return gated_delta_net(*net, num_tokens, versions, each_row, wanted=wanted)
    places = StatePlaces(recurrent_state, slots, num_tokens, versions)
    gating = Gating(projected, *layer, eps)
    return _behind_convolution(projected, conv_weight.shape[0], gating, places, each_row, wanted)
