"""What a checkpoint format is: see the package's docstring."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """What a file must hold: safetensors' names of the allowed dtypes ("BF16"), and the shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class Format(Protocol):
    """How the weights of a checkpoint are stored.

    Args:
        config: content of config.json.
        names: of the stored tensors, without the model's prefix.

    Raises:
        ConfigError: a variant that is not supported; says what to use instead.
    """

    def __init__(self, config: Mapping[str, Any], names: Collection[str]) -> None: ...

    @staticmethod
    def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Whether a checkpoint is of this format."""
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """The stored tensors that make up the weight `name`."""
        ...

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The weight `name`; `read` gives stored tensors by name."""
        ...
