"""Grouped-query attention with QK-norm, partial RoPE, KV cache and output gate."""

import math

import torch

from et_moe.backends.cuda.triton.attention.decode import attention_decode
from et_moe.backends.cuda.triton.attention.prefill import attention_prefill
from et_moe.backends.cuda.triton.common.compile_case import CompileCase
from et_moe.backends.cuda.triton.common.launch import is_one


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
    """See `et_moe.backends.ops.attention`. D is a power of two, at least 16."""
    tokens, (kv_heads, capacity, dim) = qkv.shape[0], k_cache.shape
    heads = (qkv.shape[1] // dim - 2 * kv_heads) // 2
    inputs = (qkv, q_norm, k_norm, inv_freq, k_cache, v_cache, position)
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "HALF": inv_freq.shape[0],
        "CAPACITY": capacity,
        "EPS": eps,
        "SCALE_LOG2": dim**-0.5 * math.log2(math.e),
        "HAS_NUM_TOKENS": num_tokens is not None,
    }
    inputs = (*inputs, position if num_tokens is None else num_tokens)
    if is_one(tokens):
        return attention_decode(inputs, shape)
    return attention_prefill(inputs, shape)


def compile_cases() -> list[CompileCase]:
    """The attention layers of Qwen3.5-35B-A3B, and small ones in fp32; caches of 4096 tokens."""

    def case(name, dtype, heads, kv_heads, dim, half):
        capacity = 4096

        def arguments(m, device):
            def normal(*shape):
                return torch.randn(shape, device=device).to(dtype)

            return {
                "qkv": normal(m, 2 * (heads + kv_heads) * dim),
                "q_norm": normal(dim),
                "k_norm": normal(dim),
                "inv_freq": torch.rand(half, device=device),
                "k_cache": normal(kv_heads, capacity, dim),
                "v_cache": normal(kv_heads, capacity, dim),
                "position": torch.full((1,), capacity - 1 if m == 1 else 0, device=device),
                "num_tokens": None if m == 1 else torch.full((1,), m, device=device),
            }

        suffix = "_fp32" if dtype == torch.float32 else ""
        return CompileCase(
            f"attention/{name}",
            attention,
            arguments,
            tables=(
                f"attention_decode{suffix}",
                f"attention_prefill{suffix}",
                "attention_combine",
                "attention_append",
            ),
            streams={"_decode_kernel": ("k_cache_ptr", "v_cache_ptr")},
        )

    return [
        case("qwen3_5_35b", torch.bfloat16, 16, 2, 256, 32),
        case("small_fp32", torch.float32, 4, 1, 64, 8),
    ]


def tune_candidates() -> dict[str, list[dict]]:
    """Configurations worth trying, by table."""
    flash = ((16, 32, 2, 4), (16, 32, 3, 4), (16, 64, 2, 4), (32, 32, 2, 4), (32, 64, 2, 8))
    flash += ((64, 32, 2, 4), (64, 32, 3, 4), (64, 32, 2, 8), (64, 64, 2, 8))
    flash += ((128, 32, 3, 8), (128, 64, 1, 8), (128, 64, 2, 8))
    decode = ((32, 64, 8), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 32, 4))
    combine = ((32, 4), (64, 4), (128, 4), (128, 8), (256, 8))
    return {
        "attention_decode": [{"SPLITS": s, "BLOCK_N": n, "num_warps": w} for s, n, w in decode],
        "attention_combine": [{"BLOCK_D": d, "num_warps": w} for d, w in combine],
        "attention_append": [{"num_warps": w} for w in (1, 2, 4)],
        "attention_prefill": [
            {"BLOCK_M": m, "BLOCK_N": n, "STAGES": s, "num_warps": w} for m, n, s, w in flash
        ],
    }
