"""The gated delta net (Yang et al., "Gated Delta Networks", 2024) as Qwen3.5 uses it.

States are updated in place, by valid tokens only. T tokens at once and token by token give the
same result: a kernel is free to chunk.
"""

import torch
import torch.nn.functional as F

from et_moe.backends.ops.library import declare


def _valid(tokens: int, num_tokens: torch.Tensor | None) -> int:
    return tokens if num_tokens is None else min(tokens, int(num_tokens))


def _causal_conv1d_fake(x, weight, state, num_tokens=None):
    return torch.empty_like(x)


@declare(_causal_conv1d_fake, mutates=("state",))
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise causal convolution over time, then SiLU.

    Args:
        x: float `[T, C]`.
        weight: float `[C, W]`; tap W-1 meets the current token.
        state: `[W-1, C]` in x's dtype: the inputs before the first token, oldest first. Left
            holding the last W-1 valid inputs.
        num_tokens: `int64 [1]` or None for T; later rows are padding and their output is undefined.

    Returns:
        `[T, C]` in x's dtype, computed in fp32.
    """
    tokens, taps = x.shape[0], weight.shape[1]
    window = torch.cat((state.to(x.dtype), x))
    out = sum(window[i : i + tokens].float() * weight[:, i].float() for i in range(taps))
    valid = _valid(tokens, num_tokens)
    state.copy_(window[valid : valid + taps - 1].clone())
    return F.silu(out).to(x.dtype)


def _gated_delta_rule_fake(q, k, v, g, beta, state, num_tokens=None):
    return torch.empty_like(v)


@declare(_gated_delta_rule_fake, mutates=("state",))
def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = q^T S / sqrt(Dk), token by token.

    q and k are L2-normalised here: x * rsqrt(sum(x^2) + 1e-6).

    Args:
        q, k: float `[T, Hk, Dk]`; value head h uses key head h // (Hv / Hk).
        v: float `[T, Hv, Dv]`.
        g: `float32 [T, Hv]`, log decay, at most 0. beta: `float32 [T, Hv]`.
        state: `float32 [Hv, Dk, Dv]`, updated in place.
        num_tokens: `int64 [1]` or None for T; later rows are padding and their output is undefined.

    Returns:
        `[T, Hv, Dv]` in v's dtype, computed in fp32.
    """

    def normalise(x):
        x = x.float()
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(v.shape[1] // q.shape[1], dim=1)

    q32, k32, v32 = normalise(q) * q.shape[-1] ** -0.5, normalise(k), v.float()
    out = torch.zeros_like(v32)
    s = state.clone()
    for t in range(_valid(q.shape[0], num_tokens)):
        s = s * g[t].exp()[:, None, None]
        delta = (v32[t] - torch.einsum("hk,hkv->hv", k32[t], s)) * beta[t][:, None]
        s = s + k32[t][:, :, None] * delta[:, None, :]
        out[t] = torch.einsum("hk,hkv->hv", q32[t], s)
    state.copy_(s)
    return out.to(v.dtype)


def _gated_delta_net_fake(
    projected,
    conv_weight,
    a_log,
    dt_bias,
    norm_weight,
    conv_state,
    recurrent_state,
    eps=1e-6,
    num_tokens=None,
):
    heads, _, value_dim = recurrent_state.shape
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
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """All of a gated delta net layer between its input and output projections.

    [q | k | v] = causal_conv1d(qkv); beta = sigmoid(b); g = -exp(a_log) softplus(a + dt_bias);
    o = gated_delta_rule(q, k, v, g, beta); result = rms(o) * norm_weight * silu(z) per value head.

    Args:
        projected: float `[T, C + V + 2 Hv]`, columns [q | k | v | z | b | a] with
            C = 2 Hk Dk + V and V = Hv Dv.
        conv_weight: float `[C, W]`.
        a_log, dt_bias: float `[Hv]`.
        norm_weight: float `[Dv]`, of the gated RMSNorm (ones are the identity); eps: of that norm.
        conv_state: `[W-1, C]` in projected's dtype, updated in place, see `causal_conv1d`.
        recurrent_state: `float32 [Hv, Dk, Dv]`, updated in place, see `gated_delta_rule`.
        num_tokens: `int64 [1]` or None for T; later rows are padding and their output is undefined.

    Returns:
        `[T, V]` in projected's dtype. Intermediates stay in fp32 (what the convolution and the rule
        give may be rounded to projected's dtype).
    """
    tokens, channels = projected.shape[0], conv_weight.shape[0]
    heads, key_dim, value_dim = recurrent_state.shape
    values = heads * value_dim
    qkv, z, b, a = projected.split((channels, values, heads, heads), dim=-1)
    qkv = causal_conv1d(qkv, conv_weight, conv_state, num_tokens)
    keys = (channels - values) // 2
    q, k, v = qkv.float().split((keys, keys, values), dim=-1)
    out = gated_delta_rule(
        q.reshape(tokens, -1, key_dim),
        k.reshape(tokens, -1, key_dim),
        v.reshape(tokens, heads, value_dim),
        -a_log.float().exp() * F.softplus(a.float() + dt_bias.float()),
        b.float().sigmoid(),
        recurrent_state,
        num_tokens,
    )
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    out = out.reshape(tokens, values) * F.silu(z.float())
    return out.to(projected.dtype)
