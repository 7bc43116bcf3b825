"""The routers of Qwen3.5-35B-A3B and of Qwen3-Next-80B-A3B, each with one shared expert.

In the case of a batch m is the number of sequences.
"""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor
from et_moe.backends.cuda.triton.router.op import moe_router


def _arguments(experts: int, top_k: int, normalize: bool, batch: bool):
    """Arguments of m tokens of one sequence or, if batch, of one token of each of m sequences."""

    def arguments(m, device):
        sequences, count = (m, 1) if batch else (1, m)
        return {
            "x": random_tensor(m, 2048, device=device),
            "norm_weight": random_tensor(2048, device=device) * 0.1,
            "weight": random_tensor(experts + 1, 2048, device=device) * 0.02,
            "top_k": top_k,
            "num_shared": 1,
            "num_tokens": None if m == 1 else torch.full((sequences,), count, device=device),
            "normalize": normalize,
        }

    return arguments


def _case(
    name: str, experts: int, top_k: int, tables: tuple[str, ...] = (), normalize: bool = True
) -> OpCase:
    return OpCase(
        f"moe_router/{name}",
        moe_router,
        _arguments(experts, top_k, normalize, batch=False),
        tables,
        streams={"_decode_logits_kernel": ("weight",), "_prefill_logits_kernel": ("weight",)},
    )


def _batch_case(name: str, experts: int, top_k: int) -> OpCase:
    arguments = _arguments(experts, top_k, normalize=True, batch=True)
    return OpCase(f"moe_router/{name}_batch", moe_router, arguments, tokens=(7,))


CASES = [
    _case("qwen3_5_35b", 256, 8, tables=("router_decode", "router_prefill")),
    _batch_case("qwen3_5_35b", 256, 8),
    _case("qwen3_next_80b", 512, 10),
    _case("qwen3_next_80b_not_normalized", 512, 10, normalize=False),
]

CANDIDATES = {
    "router_decode": [
        {"BLOCK_E": e, "num_warps": w, "num_stages": 1} for e in (1, 2, 4) for w in (2, 4, 8)
    ],
    "router_prefill": [
        {"BLOCK_E": e, "BLOCK_M": m, "BLOCK_K": k, "num_warps": 4, "num_stages": stages}
        for e, m in ((64, 16), (64, 32), (64, 64), (128, 32), (128, 64))
        for k in (64, 128)
        for stages in (3, 4, 6)
    ],
}
