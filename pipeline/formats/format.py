"""What a checkpoint format is: see the package's docstring."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """What a file must hold: safetensors' names of the allowed dtypes ("BF16"), and the shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class Format(Protocol):
    """How the weights of a checkpoint are stored."""

    @staticmethod
    def matches(config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this `config.json` is of this format."""
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """The stored tensors that make up the weight `name`."""
        ...

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The weight `name`; `read` gives stored tensors by name."""
        ...
