"""The routers of Qwen3.5-35B-A3B and of Qwen3-Next-80B-A3B, each with one shared expert.

In the case of a batch m is the number of sequences.
"""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor
from et_moe.backends.cuda.triton.router.op import moe_router


def _case(
    name: str,
    experts: int,
    top_k: int,
    tables: tuple[str, ...] = (),
    normalize: bool = True,
    batch: bool = False,
) -> OpCase:
    def arguments(m, device):
        counts = torch.ones(m, dtype=torch.int64, device=device)
        if not batch:
            counts = None if m == 1 else torch.full((1,), m, device=device)
        return {
            "x": random_tensor(m, 2048, device=device),
            "norm_weight": random_tensor(2048, device=device) * 0.1,
            "weight": random_tensor(experts + 1, 2048, device=device) * 0.02,
            "top_k": top_k,
            "num_shared": 1,
            "num_tokens": counts,
            "normalize": normalize,
        }

    return OpCase(
        f"moe_router/{name}",
        moe_router,
        arguments,
        tables,
        **({"tokens": (7,)} if batch else {}),
        streams={"_decode_logits_kernel": ("weight",), "_prefill_logits_kernel": ("weight",)},
    )


CASES = [
    _case("qwen3_5_35b", 256, 8, tables=("router_decode", "router_prefill")),
    _case("qwen3_5_35b_batch", 256, 8, batch=True),
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
        for stages in (3, 4)
    ],
}
