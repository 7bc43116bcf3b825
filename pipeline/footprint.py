"""How many bits a weight takes, and how many bytes of weights a decoded token needs."""

import math
from dataclasses import dataclass

from et_moe.pipeline.layers import StoredModule
from et_moe.pipeline.models import Graph


@dataclass(frozen=True)
class Footprint:
    """What the weights of a model take.

    Attributes:
        weights: their number.
        size: bytes of all of them, scales included.
        bytes_per_token: bytes that are read to decode one token of one sequence: the experts that
            it is sent to, a row of the embedding, and all of the rest.
    """

    weights: int
    size: int
    bytes_per_token: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on average, to three digits behind the point."""
        return round(8 * self.size / self.weights, 3)

    def __str__(self) -> str:
        return in_words(self.bits_per_weight, self.bytes_per_token)


def in_words(bits_per_weight: float, bytes_per_token: int) -> str:
    """The two numbers of a `Footprint` for people."""
    token = bytes_per_token / 1e6
    return f"{bits_per_weight:.2f} bits a weight, {token:,.1f} MB read for a decoded token"


def footprint(graph: Graph) -> Footprint:
    """The footprint of a graph's parameters as they are stored."""
    weights = size = token = 0
    for module in graph.modules():
        bytes_here = sum(p.nbytes for p in module.parameters(recurse=False))
        size += bytes_here
        if isinstance(module, StoredModule):
            weights += sum(math.prod(shape) for shape in module.shapes.values())
            token += round(bytes_here * module.read)
        else:
            weights += sum(p.numel() for p in module.parameters(recurse=False))
            token += bytes_here
    return Footprint(weights, size, token)
