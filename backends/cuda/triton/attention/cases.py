"""Attention at the shapes of Qwen3.5-35B-A3B and at small ones in fp32, with 4096 cached tokens.

In the cases of a batch m is the number of sequences.
"""

import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor

_CAPACITY = 4096


def arguments_of(shape: tuple, batch: bool):
    """Arguments of m tokens of one sequence or, if batch, of one token of each of m sequences."""
    dtype, heads, kv_heads, head_dim, half = shape

    def arguments(m, device):
        def normal(*shape):
            return random_tensor(*shape, device=device, dtype=dtype)

        sequences = m if batch else 1
        each = _CAPACITY // ops.PAGE_SIZE
        pool = (sequences * each, kv_heads, ops.PAGE_SIZE, head_dim)
        pages = torch.arange(sequences * each, dtype=torch.int32, device=device)
        position = _CAPACITY - 1 if batch or m == 1 else 0
        count = 1 if batch else m
        return {
            "qkv": normal(m, 2 * (heads + kv_heads) * head_dim),
            "q_norm": normal(head_dim),
            "k_norm": normal(head_dim),
            "inv_freq": torch.rand(half, device=device),
            "k_cache": normal(*pool),
            "v_cache": normal(*pool),
            "pages": pages.view(sequences, each),
            "positions": torch.full((sequences,), position, device=device),
            "num_tokens": None if m == 1 else torch.full((sequences,), count, device=device),
        }

    return arguments


# dtype, query heads, KV heads, D, rotated pairs
QWEN3_5_35B = (torch.bfloat16, 16, 2, 256, 32)
_SMALL_FP32 = (torch.float32, 4, 1, 64, 8)
_STREAMS = {"_decode_kernel": ("k_cache_ptr", "v_cache_ptr")}


def _case(name: str, shape: tuple) -> OpCase:
    suffix = "_fp32" if shape[0] == torch.float32 else ""
    tables = (f"attention_decode{suffix}", f"attention_prefill{suffix}")
    tables = (*tables, "attention_combine", "attention_append")
    arguments = arguments_of(shape, batch=False)
    return OpCase(f"attention/{name}", attention, arguments, tables, streams=_STREAMS)


def _batch_case(name: str, shape: tuple) -> OpCase:
    arguments = arguments_of(shape, batch=True)
    return OpCase(f"attention/{name}_batch", attention, arguments, tokens=(7,), streams=_STREAMS)


def _drafts_case(name: str, shape: tuple) -> OpCase:
    """The rows of drafts of one sequence."""

    def arguments(m, device):
        given = arguments_of(shape, batch=False)(m, device)
        given["positions"] = torch.full((1,), _CAPACITY - m, device=device)
        return given | {"each_row": True}

    name = f"attention/{name}_drafts"
    return OpCase(name, attention, arguments, tokens=(2, 3, 4), streams=_STREAMS)


def _head_case(name: str, shape: tuple) -> OpCase:
    """Attention of an MTP head, whose keys begin at token 1."""

    def arguments(m, device):
        return arguments_of(shape, batch=False)(m, device) | {"first_token": 1}

    return OpCase(f"attention/{name}_head", attention, arguments, streams=_STREAMS)


CASES = [
    _case("qwen3_5_35b", QWEN3_5_35B),
    _case("small_fp32", _SMALL_FP32),
    _batch_case("qwen3_5_35b", QWEN3_5_35B),
    _drafts_case("qwen3_5_35b", QWEN3_5_35B),
    _head_case("qwen3_5_35b", QWEN3_5_35B),
    _head_case("small_fp32", _SMALL_FP32),
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
