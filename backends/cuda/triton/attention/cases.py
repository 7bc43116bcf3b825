"""Attention at the shapes of Qwen3.5-35B-A3B and at small ones in fp32, with 4096 cached tokens."""

import torch

from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor

_CAPACITY = 4096


def _case(
    name: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, half: int
) -> OpCase:
    def arguments(m, device):
        def normal(*shape):
            return random_tensor(*shape, device=device, dtype=dtype)

        return {
            "qkv": normal(m, 2 * (heads + kv_heads) * head_dim),
            "q_norm": normal(head_dim),
            "k_norm": normal(head_dim),
            "inv_freq": torch.rand(half, device=device),
            "k_cache": normal(kv_heads, _CAPACITY, head_dim),
            "v_cache": normal(kv_heads, _CAPACITY, head_dim),
            "position": torch.full((1,), _CAPACITY - 1 if m == 1 else 0, device=device),
            "num_tokens": None if m == 1 else torch.full((1,), m, device=device),
        }

    suffix = "_fp32" if dtype == torch.float32 else ""
    tables = (f"attention_decode{suffix}", f"attention_prefill{suffix}")
    return OpCase(
        f"attention/{name}",
        attention,
        arguments,
        tables=(*tables, "attention_combine", "attention_append"),
        streams={"_decode_kernel": ("k_cache_ptr", "v_cache_ptr")},
    )


CASES = [
    _case("qwen3_5_35b", torch.bfloat16, 16, 2, 256, 32),
    _case("small_fp32", torch.float32, 4, 1, 64, 8),
]

_DECODE = ((32, 64, 8), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 32, 4))
_COMBINE = ((32, 4), (64, 4), (128, 4), (128, 8), (256, 8))
_PREFILL = (
    *((16, 32, 2, 4), (16, 32, 3, 4), (16, 64, 2, 4), (32, 32, 2, 4), (32, 64, 2, 8)),
    *((64, 32, 2, 4), (64, 32, 3, 4), (64, 32, 2, 8), (64, 64, 2, 8)),
    *((128, 32, 3, 8), (128, 64, 1, 8), (128, 64, 2, 8)),
)

CANDIDATES = {
    "attention_decode": [{"SPLITS": s, "BLOCK_N": n, "num_warps": w} for s, n, w in _DECODE],
    "attention_combine": [{"BLOCK_D": d, "num_warps": w} for d, w in _COMBINE],
    "attention_append": [{"num_warps": w} for w in (1, 2, 4)],
    "attention_prefill": [
        {"BLOCK_M": m, "BLOCK_N": n, "STAGES": s, "num_warps": w} for m, n, s, w in _PREFILL
    ],
}
