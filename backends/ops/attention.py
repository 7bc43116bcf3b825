"""Grouped-query attention of Qwen3.5: QK-norm, partial RoPE, KV cache, output gate."""

import torch

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.linear import rms_norm


def apply_rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotates the first 2R columns of each head, halves paired (Su et al., "RoFormer", 2021).

    Args:
        x: `float32 [T, heads, D]`; positions: `int64 [T]`; inv_freq: `float32 [R]`, 2R <= D.
    """
    half = inv_freq.shape[0]
    angle = positions.float()[:, None, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _attention_fake(
    qkv, q_norm, k_norm, inv_freq, k_cache, v_cache, position, eps=1e-6, num_tokens=None
):
    kv_heads, _, head_dim = k_cache.shape
    return qkv.new_empty((qkv.shape[0], (qkv.shape[1] - 2 * kv_heads * head_dim) // 2))


@declare(_attention_fake, mutates=("k_cache", "v_cache"))
def attention(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    inv_freq: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    position: torch.Tensor,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Everything of a full attention layer between its input and output projections.

    q and k are RMS-normed per head (zero-centred weights) and rotated, k and v are appended to the
    cache at `position`, token t attends to cache rows 0..position+t with scale D^-0.5, and the
    result is multiplied by sigmoid(gate).

    Args:
        qkv: float `[T, 2 Hq D + 2 Hkv D]`: per query head [q (D) | gate (D)], then k, then v.
        q_norm, k_norm: float `[D]`. inv_freq: `float32 [R]`, 2R <= D.
        k_cache, v_cache: `[Hkv, S, D]` in qkv's dtype, updated in place (rows of valid tokens).
        position: `int64 [1]`, of the first token; position + valid tokens <= S.
        num_tokens: `int64 [1]` or None for T; later rows are padding and their output is undefined.

    Returns:
        `[T, Hq D]` in qkv's dtype, computed in fp32 from the cached (rounded) k and v.
    """
    tokens = qkv.shape[0]
    kv_heads, capacity, dim = k_cache.shape
    valid = tokens if num_tokens is None else min(tokens, int(num_tokens))
    start = int(position)
    if start < 0 or start + valid > capacity:
        raise ValueError(f"tokens {start}..{start + valid - 1} do not fit a cache of {capacity}")
    values = kv_heads * dim
    q_and_gate, k, v = qkv.float().split((qkv.shape[1] - 2 * values, values, values), dim=-1)
    q, gate = q_and_gate.reshape(tokens, -1, 2 * dim).chunk(2, dim=-1)
    positions = torch.arange(start, start + tokens, device=qkv.device)
    q = apply_rope(rms_norm(q, q_norm, eps), positions, inv_freq)
    k = apply_rope(rms_norm(k.reshape(tokens, kv_heads, dim), k_norm, eps), positions, inv_freq)
    end = start + valid
    k_cache[:, start:end] = k[:valid].transpose(0, 1).to(k_cache.dtype)
    v_cache[:, start:end] = (
        v[:valid].reshape(valid, kv_heads, dim).transpose(0, 1).to(v_cache.dtype)
    )
    group = q.shape[1] // kv_heads
    keys = k_cache[:, :end].float().repeat_interleave(group, dim=0)
    vals = v_cache[:, :end].float().repeat_interleave(group, dim=0)
    scores = torch.einsum("thd,hsd->hts", q, keys) * dim**-0.5
    future = torch.arange(end, device=qkv.device)[None, :] > positions[:, None]
    out = torch.einsum("hts,hsd->thd", scores.masked_fill(future, float("-inf")).softmax(-1), vals)
    return (out * gate.sigmoid()).reshape(tokens, -1).to(qkv.dtype)
