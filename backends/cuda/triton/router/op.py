"""The router of the mixture of experts; the contract is `ops.moe_router`.

A few rows: logits over many programs, each of which norms the row anew. Many rows: the norm and the
shared expert's gate row by row, then the logits on tensor cores. Behind both, one program per row
chooses.
"""

import torch

from et_moe.backends.cuda.triton.common.tokens import is_decode
from et_moe.backends.cuda.triton.router.choice import choose_experts
from et_moe.backends.cuda.triton.router.logits import compute_decode_logits, compute_prefill_logits


def moe_router(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    num_shared: int,
    eps: float = 1e-6,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.moe_router` in two launches for a few rows, else three."""
    m, experts = x.shape[0], weight.shape[0] - 1
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k {top_k} of {experts} experts: expected 1..{experts}")
    compute_logits = compute_decode_logits if is_decode(m) else compute_prefill_logits
    normed_x, logits = compute_logits(x.contiguous(), norm_weight, weight.contiguous(), eps)
    return normed_x, *choose_experts(logits, num_tokens, top_k, num_shared)
