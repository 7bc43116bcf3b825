"""The gates of the gated delta net: where kernels find them, and how they are computed."""

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def compute_gates(b, a, a_log, dt_bias):
    """beta = sigmoid(b) and g = -exp(a_log) softplus(a + dt_bias), all fp32."""
    x = a + dt_bias
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(1 + e) that is exact for small e (Kahan): the rounding error of u cancels in e / (u - 1).
    exact = u == 1.0
    log1p = tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1.0, u - 1.0)))
    return tl.sigmoid(b), -tl.exp(a_log) * (tl.maximum(x, 0.0) + log1p)


@dataclasses.dataclass(frozen=True)
class Gating:
    """What the layer adds to the rule: how its gates are made, and a gated norm behind it.

    Attributes:
        projected: `[T, C + V + 2 Hv]`, of which the columns from C on are z, b and a.
        a_log, dt_bias: `[Hv]`.
        norm_weight: `[Dv]`; eps: of the norm.
    """

    projected: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    eps: float


class Gates(NamedTuple):
    """Arguments of the kernels for gates and norm; without a `Gating` any tensors stand for most.

    Attributes:
        gated: whether there is a `Gating`. Else b is beta and a is g, both ready.
        b_column, a_column, z_column: where these begin in their rows.
    """

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
    """The arguments for `gates` as `chunk_gated_delta` takes them.

    channels, values, heads: C, V and Hv, which say where z, b and a lie in a projected row.
    """
    if isinstance(gates, Gating):
        projected, layer = gates.projected, (gates.a_log, gates.dt_bias, gates.norm_weight)
        z, b = channels, channels + values
        return Gates(projected, projected, projected, *layer, True, gates.eps, b, b + heads, z)
    g, beta = gates
    return Gates(beta, g, g, g, g, g, False, 0.0, 0, 0, 0)
