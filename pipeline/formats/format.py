"""What a checkpoint format is: see the package's docstring."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
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


class HeaderError(ConfigError):
    """What is wrong with an entry of the metadata in the header of a file; the reader adds it.

    Attributes:
        key: of the metadata, or the name of a weight that it describes.
        problem: what is said behind the key.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key, self.problem = key, problem


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, by which its format is told.

    Attributes:
        directory: of the checkpoint.
        config: content of config.json.
        tensors: the stored tensors by name, without the model's prefix; each with its one dtype.
        metadata: of the headers of all files.
        read: a stored tensor by name. What is read to tell a format must be small.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]


class Format(Protocol):
    """How the weights of a checkpoint are stored.

    Attributes:
        names: of the weights, quantized or not.
        skipped: stored tensors that are of no use.

    Raises:
        ConfigError: a variant that is not supported; says what to use instead. From all methods.
    """

    names: Collection[str]
    skipped: Collection[str]

    def __init__(self, contents: Contents) -> None: ...

    @staticmethod
    def matches(contents: Contents) -> bool:
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
