"""The router of the mixture of experts: RMSNorm, logits, and the choice of experts.

For a few tokens, many programs compute the logits, and each of them norms its token anew. For many
tokens, norm and shared expert's gate are computed token by token, then the logits on tensor cores.
Behind both, one program per token chooses its experts.
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
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.moe_router` in two launches for up to `DECODE_TOKENS` tokens, else in three.

    Args:
        x: `[T, H]`, bf16 or fp32; norm_weight `[H]` and weight `[E + 1, H]` have the same dtype.
        num_tokens: `int64 [B]` or None.

    Returns:
        x normed, `[T, H]` in x's dtype; weights `float32` and ids `int32`, both
        `[T, top_k + num_shared]`.

    Raises:
        ValueError: there are fewer experts than top_k.
    """
    m, experts = x.shape[0], weight.shape[0] - 1
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k {top_k} of {experts} experts: expected 1..{experts}")
    compute_logits = compute_decode_logits if is_decode(m) else compute_prefill_logits
    normed_x, logits = compute_logits(x.contiguous(), norm_weight, weight.contiguous(), eps)
    return normed_x, *choose_experts(logits, num_tokens, top_k, num_shared, normalize)
