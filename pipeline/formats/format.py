"""What a checkpoint format is: see the package's docstring."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.storage import Int4


@dataclass(frozen=True)
class StoredTensor:
    """What a file must hold: safetensors' names of the allowed dtypes ("BF16"), and the shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class TensorError(ConfigError):
    """What is wrong with a stored tensor; the reader adds its file.

    Attributes:
        tensor: its name. problem: what is said behind the name.
    """

    def __init__(self, tensor: str, problem: str) -> None:
        super().__init__(f"{tensor} {problem}")
        self.tensor, self.problem = tensor, problem


class Format(Protocol):
    """How the weights of a checkpoint are stored.

    Args:
        config: content of config.json.
        tensors: the stored tensors by name, without the model's prefix; each with its one dtype.

    Attributes:
        names: of the weights, quantized or not.

    Raises:
        ConfigError: a variant that is not supported; says what to use instead. From all methods.
    """

    names: Collection[str]

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None: ...

    @staticmethod
    def matches(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bool:
        """Whether a checkpoint is of this format."""
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """The stored tensors that make up the weight `name`."""
        ...

    def kept(self, name: str) -> Int4 | None:
        """The storage of a weight that keeps its values and scales; None for all others."""
        ...

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The weight `name`: floats, or codes (`pipeline/codes.py`) where `kept` has a storage;
        `read` gives stored tensors by name."""
        ...
