"""The gates of the gated delta net: where the kernels find them, and what becomes of them."""

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def delta_gates(b, a, a_log, dt_bias):
    """beta = sigmoid(b) and g = -exp(a_log) softplus(a + dt_bias)."""
    x = a + dt_bias
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(1 + e) that keeps a small e (Kahan): the rounding error of u cancels in e / (u - 1).
    exact = u == 1.0
    log1p = tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1.0, u - 1.0)))
    return tl.sigmoid(b), -tl.exp(a_log) * (tl.maximum(x, 0.0) + log1p)


@dataclasses.dataclass(frozen=True)
class Gating:
    """What the layer adds to the rule: raw gates in, a gated norm behind.

    Attributes:
        projected: `[T, C + V + 2 Hv]`, holds z, b and a from column C on.
        a_log, dt_bias: `[Hv]`. norm_weight: `[Dv]`. eps: of the norm.
    """

    projected: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float


class Gates(NamedTuple):
    """Arguments of the kernels for gates and norm; any tensors where there is no `Gating`."""

    b: torch.Tensor
    a: torch.Tensor
    z: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    gated: bool
    eps: float
    b_column: int
    a_column: int
    z_column: int


def find_gates(
    gates: tuple[torch.Tensor, torch.Tensor] | Gating, channels: int, values: int, heads: int
) -> Gates:
    """Of `gates` as in `chunk_gated_delta`; z, b and a lie behind the `channels`."""
    if isinstance(gates, Gating):
        projected, layer = gates.projected, (gates.a_log, gates.dt_bias, gates.norm_weight)
        z, b = channels, channels + values
        return Gates(projected, projected, projected, *layer, True, gates.eps, b, b + heads, z)
    g, beta = gates
    return Gates(beta, g, g, g, g, g, False, 0.0, 0, 0, 0)
