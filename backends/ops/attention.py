"""Grouped-query attention of Qwen3.5: QK-norm, partial RoPE, KV cache, output gate."""

import torch

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.linear import rms_norm
from et_moe.backends.ops.sequences import PAGE_SIZE, sequence_rows


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
    qkv,
    q_norm,
    k_norm,
    inv_freq,
    k_cache,
    v_cache,
    pages,
    positions,
    eps=1e-6,
    num_tokens=None,
    first_token=0,
    each_row=False,
):
    _, kv_heads, _, head_dim = k_cache.shape
    return qkv.new_empty((qkv.shape[0], (qkv.shape[1] - 2 * kv_heads * head_dim) // 2))


@declare(_attention_fake, mutates=("k_cache", "v_cache"))
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
) -> torch.Tensor:
    """Everything of a full attention layer between its input and output projections.

    q and k are RMS-normed per head (zero-centred weights) and rotated, k and v are appended to the
    cache of their sequence at its position, row r attends to that sequence's tokens
    first_token..position+r with scale D^-0.5, and the result is multiplied by sigmoid(gate). See
    `sequences.py`.

    Args:
        qkv: float `[B R, 2 Hq D + 2 Hkv D]`: per query head [q (D) | gate (D)], then k, then v.
        q_norm, k_norm: float `[D]`. inv_freq: `float32 [R]`, 2R <= D.
        k_cache, v_cache: `[P, Hkv, 64, D]` in qkv's dtype, updated in place (tokens of valid rows).
        pages: `int32 [B, M]`. positions: `int64 [B]`, of each sequence's first row; position +
            valid rows <= 64 M.
        num_tokens: `int64 [B]` or None for R; further rows are padding with undefined outputs.
        first_token: 0 to 64 M; k and v at positions before it are cached and never read. A row
            there attends to nothing, and its result is 0.
        each_row: whether a row shall have the bits that it has in a call of one row. Kernels may
            take few rows only then.

    Returns:
        `[B R, Hq D]` in qkv's dtype, computed in fp32 from the cached (rounded) k and v.

    Raises:
        ValueError: tokens that do not fit the pages, or a first_token that does not.
    """
    if not 0 <= first_token <= PAGE_SIZE * pages.shape[1]:
        room = f"{pages.shape[1]} pages"
        raise ValueError(f"first_token: expected a token of {room} or their end, got {first_token}")
    _, kv_heads, _, dim = k_cache.shape
    values = kv_heads * dim
    width = (qkv.shape[1] - 2 * values) // 2
    out = qkv.new_zeros((qkv.shape[0], width), dtype=torch.float32)
    weights = (q_norm, k_norm, inv_freq)
    for b, first, valid in sequence_rows(qkv.shape[0], positions.shape[0], num_tokens):
        rows = slice(first, first + valid)
        start, end = int(positions[b]), int(positions[b]) + valid
        if start < 0 or end > PAGE_SIZE * pages.shape[1]:
            room = f"{pages.shape[1]} pages"
            raise ValueError(f"tokens {start}..{end - 1} of sequence {b} do not fit {room}")
        q_and_gate, k, v = qkv[rows].float().split((qkv.shape[1] - 2 * values, values, values), -1)
        q, gate = q_and_gate.reshape(valid, -1, 2 * dim).chunk(2, dim=-1)
        token = torch.arange(end, device=qkv.device)
        page, place = pages[b].long()[token // PAGE_SIZE], token % PAGE_SIZE
        q, k = _norm_and_rotate(q, k.reshape(valid, kv_heads, dim), token[start:], weights, eps)
        new = (page[start:], slice(None), place[start:])
        k_cache[new] = k.to(k_cache.dtype)
        v_cache[new] = v.reshape(valid, kv_heads, dim).to(v_cache.dtype)
        seen = (page[first_token:], slice(None), place[first_token:])
        keys, vals = k_cache[seen].float(), v_cache[seen].float()
        attended = _attend(q, keys, vals, token[start:] - first_token)
        out[rows] = (attended * gate.sigmoid()).reshape(valid, -1)
    return out.to(qkv.dtype)


def _norm_and_rotate(q, k, positions, weights, eps) -> tuple[torch.Tensor, torch.Tensor]:
    q_norm, k_norm, inv_freq = weights
    return (
        apply_rope(rms_norm(q, q_norm, eps), positions, inv_freq),
        apply_rope(rms_norm(k, k_norm, eps), positions, inv_freq),
    )


def _attend(q, keys, values, positions) -> torch.Tensor:
    """Causal attention `[T, Hq, D]` of q at positions `[T]` to keys and values `[S, Hkv, D]`; 0 at
    negative positions."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("thd,shd->hts", q, keys) * q.shape[-1] ** -0.5
    future = torch.arange(len(keys), device=q.device)[None, :] > positions[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    weights = weights.masked_fill((positions < 0)[:, None], 0.0)
    return torch.einsum("hts,shd->thd", weights, values)
