"""The gated delta net (Yang et al., "Gated Delta Networks", 2024) as Qwen3.5 uses it.

States are updated in place, by valid rows only. Rows at once and row by row give the same result: a
kernel is free to chunk, except that with `each_row` a row has the bits that it has in a call of one
row. Rows belong to sequences, and states, perhaps in versions, lie in slots, see `sequences.py`.

A recurrent state may be bfloat16. Arithmetic is in fp32 all the same, and the state is rounded to
nearest, ties to even, where it is left: behind every row with `each_row`, else behind the last row,
and also behind every `PAGE_SIZE` rows of a call. The rows behind go on from what was rounded, and
an output is computed before. So a call that is cut behind a multiple of `PAGE_SIZE` rows leaves
what it leaves as a whole; one that is cut elsewhere, or taken row by row, is rounded more often.
"""

import torch
import torch.nn.functional as F

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.sequences import (
    PAGE_SIZE,
    check_each_row,
    rows_each,
    sequence_rows,
    version_of,
)


def _causal_conv1d_fake(x, weight, state, slots, num_tokens=None, versions=None, each_row=False):
    return torch.empty_like(x)


@declare(_causal_conv1d_fake, mutates=("state",))
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
    versions: torch.Tensor | None = None,
    each_row: bool = False,
) -> torch.Tensor:
    """Depthwise causal convolution over time, then SiLU.

    Args:
        x: float `[B R, C]`.
        weight: float `[C, W]`; tap W-1 meets the current token.
        state: `[S, W-1, C]` in x's dtype: of each slot the inputs before the first token, oldest
            first. Left holding the last W-1 valid inputs.
        slots: `int32 [B]`.
        num_tokens: `int64 [B]` or None for R; further rows are padding with undefined outputs.
        versions: `int64 [B]` or None; with them state is `[S, W-2+V, C]`, of which version v is
            rows v to v+W-2. each_row: whether each row leaves a version, R of them at most V.

    Returns:
        `[B R, C]` in x's dtype, computed in fp32.

    Raises:
        ValueError: a version that there is not, or each_row with more rows than versions.
    """
    taps, out = weight.shape[1], torch.zeros_like(x)
    count = 1 if versions is None else state.shape[1] - (taps - 2)
    check_each_row(each_row, rows_each(x.shape[0], slots.shape[0]), versions, count)
    for b, first, valid in sequence_rows(x.shape[0], slots.shape[0], num_tokens):
        own, version = state[int(slots[b])], version_of(versions, b, count)
        earlier = own[version : version + taps - 1].to(x.dtype)
        window = torch.cat((earlier, x[first : first + valid]))
        sums = sum(window[i : i + valid].float() * weight[:, i].float() for i in range(taps))
        out[first : first + valid] = F.silu(sums).to(x.dtype)
        left = window[1 if each_row else valid :]
        own[: len(left)] = left.to(own.dtype)
    return out


def _gated_delta_rule_fake(
    q, k, v, g, beta, state, slots, num_tokens=None, versions=None, each_row=False
):
    return torch.empty_like(v)


@declare(_gated_delta_rule_fake, mutates=("state",))
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
    """S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = q^T S / sqrt(Dk), token by token.

    q and k are L2-normalised here: x * rsqrt(sum(x^2) + 1e-6).

    Args:
        q, k: float `[B R, Hk, Dk]`; value head h uses key head h // (Hv / Hk).
        v: float `[B R, Hv, Dv]`.
        g: `float32 [B R, Hv]`, log decay, at most 0. beta: `float32 [B R, Hv]`.
        state: float `[S, Hv, Dk, Dv]`, updated in place. slots: `int32 [B]`.
        num_tokens: `int64 [B]` or None for R; further rows are padding with undefined outputs.
        versions: `int64 [B]` or None; with them state is `[S, V, Hv, Dk, Dv]`. each_row: whether
            each row leaves a version, R of them at most V.

    Returns:
        `[B R, Hv, Dv]` in v's dtype, computed in fp32.

    Raises:
        ValueError: a version that there is not, or each_row with more rows than versions.
    """

    def normalise(x):
        x = x.float()
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(v.shape[1] // q.shape[1], dim=1)

    q32, k32, v32 = normalise(q) * q.shape[-1] ** -0.5, normalise(k), v.float()
    decay, out = g.exp(), torch.zeros_like(v32)
    pool = state.unsqueeze(1) if versions is None else state
    check_each_row(each_row, rows_each(q.shape[0], slots.shape[0]), versions, pool.shape[1])
    by_length: dict[int, list[tuple[int, int, int]]] = {}
    for b, first, valid in sequence_rows(q.shape[0], slots.shape[0], num_tokens):
        start = version_of(versions, b, pool.shape[1])
        by_length.setdefault(valid, []).append((b, first, start))
    for valid, sequences in by_length.items():  # those of one length take their steps together
        chosen, rows, starts = torch.tensor(sequences, device=q.device).unbind(1)
        places = slots[chosen].long()
        s = pool[places, starts].float()
        for t in range(valid):
            at = rows + t
            s *= decay[at][:, :, None, None]
            delta = (v32[at] - torch.einsum("bhk,bhkv->bhv", k32[at], s)) * beta[at][..., None]
            s += k32[at][..., None] * delta[:, :, None, :]
            out[at] = torch.einsum("bhk,bhkv->bhv", q32[at], s)
            is_left = each_row or t == valid - 1
            if is_left or (t + 1) % PAGE_SIZE == 0:
                s = s.to(pool.dtype).float()
            if is_left:
                pool[places, t if each_row else 0] = s.to(pool.dtype)
    return out.to(v.dtype)


def _gated_delta_net_fake(
    projected,
    conv_weight,
    a_log,
    dt_bias,
    norm_weight,
    conv_state,
    recurrent_state,
    slots,
    eps=1e-6,
    num_tokens=None,
    versions=None,
    each_row=False,
):
    *_, heads, _, value_dim = recurrent_state.shape
    return projected.new_empty((projected.shape[0], heads * value_dim))


@declare(_gated_delta_net_fake, mutates=("conv_state", "recurrent_state"))
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
) -> torch.Tensor:
    """All of a gated delta net layer between its input and output projections.

    [q | k | v] = causal_conv1d(qkv); beta = sigmoid(b); g = -exp(a_log) softplus(a + dt_bias);
    o = gated_delta_rule(q, k, v, g, beta); result = rms(o) * norm_weight * silu(z) per value head.

    Args:
        projected: float `[B R, C + V + 2 Hv]`, columns [q | k | v | z | b | a] with
            C = 2 Hk Dk + V and V = Hv Dv.
        conv_weight: float `[C, W]`.
        a_log, dt_bias: float `[Hv]`.
        norm_weight: float `[Dv]`, of the gated RMSNorm (ones are the identity); eps: of that norm.
        conv_state: `[S, W-1, C]` in projected's dtype, updated in place, see `causal_conv1d`.
        recurrent_state: float `[S, Hv, Dk, Dv]`, updated in place, see `gated_delta_rule`.
        slots: `int32 [B]`.
        num_tokens: `int64 [B]` or None for R; further rows are padding with undefined outputs.
        versions: `int64 [B]` or None, of both states; each_row: whether each row leaves a version.
            See `causal_conv1d` and `gated_delta_rule` for shapes.

    Returns:
        `[B R, V]` in projected's dtype. Intermediates stay in fp32 (what the convolution and the
        rule give may be rounded to projected's dtype).

    Raises:
        ValueError: a version that there is not, or each_row with more rows than versions.
    """
    tokens, channels = projected.shape[0], conv_weight.shape[0]
    *_, heads, key_dim, value_dim = recurrent_state.shape
    values = heads * value_dim
    qkv, z, b, a = projected.split((channels, values, heads, heads), dim=-1)
    places = (slots, num_tokens, versions, each_row)
    qkv = causal_conv1d(qkv, conv_weight, conv_state, *places)
    keys = (channels - values) // 2
    q, k, v = qkv.float().split((keys, keys, values), dim=-1)
    out = gated_delta_rule(
        q.reshape(tokens, -1, key_dim),
        k.reshape(tokens, -1, key_dim),
        v.reshape(tokens, heads, value_dim),
        -a_log.float().exp() * F.softplus(a.float() + dt_bias.float()),
        b.float().sigmoid(),
        recurrent_state,
        *places,
    )
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    out = out.reshape(tokens, values) * F.silu(z.float())
    return out.to(projected.dtype)
