"""All cases and all candidates for tuning; a new `<op>/cases.py` is entered here."""

from et_moe.backends.cuda.triton.attention import cases as attention
from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.causal_conv1d import cases as causal_conv1d
from et_moe.backends.cuda.triton.embedding import cases as embedding
from et_moe.backends.cuda.triton.gated_delta_net import cases as gated_delta_net
from et_moe.backends.cuda.triton.hand_over import cases as hand_over
from et_moe.backends.cuda.triton.linear import cases as linear
from et_moe.backends.cuda.triton.moe import cases as moe
from et_moe.backends.cuda.triton.out_projection import cases as out_projection
from et_moe.backends.cuda.triton.quantization import cases as quantization
from et_moe.backends.cuda.triton.router import cases as router
from et_moe.backends.cuda.triton.sampling import cases as sampling
from et_moe.backends.cuda.triton.token_shift import cases as token_shift

OP_CASES: tuple[OpCase, ...] = (
    *attention.CASES,
    *embedding.CASES,
    *gated_delta_net.CASES,
    *hand_over.CASES,
    *linear.CASES,
    *moe.CASES,
    *out_projection.CASES,
    *quantization.CASES,
    *router.CASES,
    *sampling.CASES,
    *token_shift.CASES,
)

TUNING_CANDIDATES: dict[str, list[dict[str, int]]] = {
    **attention.CANDIDATES,
    **causal_conv1d.CANDIDATES,
    **gated_delta_net.CANDIDATES,
    **linear.CANDIDATES,
    **moe.CANDIDATES,
    **quantization.CANDIDATES,
    **router.CANDIDATES,
}
"""Tuning table -> configurations worth trying."""

ONE_ORDER: dict[str, tuple[str, ...]] = moe.ONE_ORDER
"""Tuning table -> parameters with one value for all sizes of a GPU. They decide in which order
floats are added up, and a row's bits must not depend on how many rows there are."""
