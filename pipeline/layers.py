"""The layers that models are built of: each holds the storage of its weights.

Parameters carry the names of a bundle. None of them is trained.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from et_moe.pipeline.storage import Precision, Storage


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter on the current default device."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Weight(nn.Module):
    """Holds the weight of a norm, convolution or router; the op that uses it gets it passed."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(*shape, dtype=dtype)


class StoredModule(nn.Module):
    """A module whose weights are kept by a storage.

    Attributes:
        storage: of all its weights.
        stored: names of its weights -> the names of the tensors kept of each.
        shapes: names of its weights -> their shapes.
        precision: of the model.
        read: the fraction of its weights that a decoded token needs.
    """

    def __init__(self, part: str, precision: Precision, read: Fraction = Fraction(1)) -> None:
        super().__init__()
        self.storage: Storage = precision.storages[part]
        self.stored: dict[str, tuple[str, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.read = read
        self.precision = precision

    def _store(self, module: str, weight: str, *shape: int) -> None:
        """Makes the parameters of a weight `[..., N, K]`; `module` is this one's full name."""
        entries = self.storage.tensors(f"{module}.{weight}", shape, self.precision.dtype)
        for name, (dtype, sizes) in entries.items():
            setattr(self, name.rpartition(".")[2], parameter(*sizes, dtype=dtype))
        self.shapes[weight] = shape
        self.stored[weight] = tuple(name.rpartition(".")[2] for name in entries)

    def _tensors(self, weight: str) -> list[Tensor]:
        return [getattr(self, name) for name in self.stored[weight]]


class Linear(StoredModule):
    """A projection from k to n columns, with an RMSNorm in front and a residual behind if given."""

    def __init__(
        self, name: str, part: str, k: int, n: int, eps: float, precision: Precision
    ) -> None:
        super().__init__(part, precision)
        self.eps = eps
        self._store(name, "weight", n, k)

    def forward(
        self, x: Tensor, norm: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Args: x float `[T, k]`; norm float `[k]`; residual float `[T, n]`. Returns `[T, n]`."""
        dtype = self.precision.activation_dtype
        return self.storage.linear(x, self._tensors("weight"), dtype, norm, self.eps, residual)


class GatedMlp(nn.Module):
    """down(silu(gate) * up), every column for every token, of a part of its own."""

    def __init__(
        self, name: str, part: str, hidden: int, inner: int, eps: float, precision: Precision
    ) -> None:
        super().__init__()
        sizes = hidden, 2 * inner, eps, precision
        self.gate_up_proj = Linear(f"{name}.gate_up_proj", part, *sizes)
        self.down_proj = Linear(f"{name}.down_proj", part, inner, hidden, eps, precision)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        norm: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Args: x and residual `[T, hidden]`; norm `[hidden]`, in front; scale float32 `[T, 1]` of
        the result. Returns `[T, hidden]`."""
        gate, up = self.gate_up_proj(x, norm).chunk(2, dim=-1)
        inner = nn.functional.silu(gate) * up
        if scale is not None:
            inner = (inner * scale).to(x.dtype)
        return self.down_proj(inner, residual=residual)


class Embedding(StoredModule):
    """A table of `rows` vectors of `width` columns."""

    def __init__(self, name: str, part: str, rows: int, width: int, precision: Precision) -> None:
        super().__init__(part, precision, Fraction(1, rows))
        self._store(name, "weight", rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[T, width]` for ids `int64 [T]`."""
        return self.storage.embedding(ids, self._tensors("weight"), self.precision.dtype)


class Experts(StoredModule):
    """Tables of expert MLPs: `count` experts that map `hidden` to `hidden` by way of `inner`, of
    which a token needs `chosen`."""

    def __init__(
        self,
        name: str,
        part: str,
        count: int,
        chosen: int,
        hidden: int,
        inner: int,
        precision: Precision,
    ) -> None:
        super().__init__(part, precision, Fraction(chosen, count))
        self._store(name, "w13", count, 2 * inner, hidden)
        self._store(name, "w2", count, hidden, inner)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
        """Args: x `[T, hidden]`, normed; weights `float32` and ids `int32 [T, S]` of the chosen
        experts; residual `[T, hidden]`. Returns `[T, hidden]`."""
        w13, w2 = self._tensors("w13"), self._tensors("w2")
        dtype = self.precision.activation_dtype
        return self.storage.experts(x, w13, w2, dtype, weights, ids, residual)


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a graph that is kept by a storage, and the names of the tensors kept of it."""

    storage: Storage
    tensors: tuple[str, ...]


def stored_weights(graph: nn.Module) -> dict[str, StoredWeight]:
    """The weights of a graph that a storage keeps, by name; other parameters stay as they are."""
    return {
        f"{module_name}.{weight}": StoredWeight(
            module.storage, tuple(f"{module_name}.{tensor}" for tensor in tensors)
        )
        for module_name, module in graph.named_modules()
        if isinstance(module, StoredModule)
        for weight, tensors in module.stored.items()
    }
