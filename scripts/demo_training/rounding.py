"""Training for INT4: a model that is computed with rounded weights learns to do with them."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

GROUP_SIZE = 32
ROUNDED_FROM = 0.5
"""The share of a training behind which weights are rounded."""
DENSE = ("embed_tokens.weight", "conv1d.weight")
"""How names of matrices end that programs do not store as INT4; small ones are not, either."""


def rounded(weight: Tensor) -> Tensor:
    """A weight `[..., N, K]` with values that symmetric INT4 in groups of GROUP_SIZE can hold."""
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
    return ((groups / scale).round() * scale).flatten(-2)


def int4_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that programs store as INT4."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and min(parameter.shape[-2:]) >= GROUP_SIZE
        and not name.endswith(DENSE)
    ]


@contextlib.contextmanager
def rounding(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Rounds a model's weights, if `on`, until the block ends, when they are as before.

    Gradients that are taken inside are those of the rounded weights, and may be applied to the
    weights themselves: the straight-through estimator (arXiv 1308.3432).
    """
    weights = int4_weights(model) if on else []
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight, values in zip(weights, kept, strict=True):
            weight.data = rounded(values)
        yield
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data = values
