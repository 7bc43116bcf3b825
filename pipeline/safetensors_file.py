"""Reads a safetensors file tensor by tensor, without mapping it.

`safetensors.safe_open` maps the whole file privately, which the kernel refuses for a file larger
than memory and swap, and parses the header anew for every file that is opened. Here the header is
read once, and a tensor's bytes are read where they stand.

Format: https://huggingface.co/docs/safetensors/index#format, as `safetensors_stream` writes it.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from et_moe.pipeline.config import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library limits it."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: the format's name of its dtype, its shape, and where its bytes are,
    counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The header of a safetensors file, and its tensors on demand.

    Attributes:
        entries: the tensors by name, in the order of the header.
        metadata: of the header.

    Raises:
        ConfigError: the file is missing or malformed; names it and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length), object_pairs_hook=_unique)
            self.entries = _entries(header, 8 + length, size)
            self.metadata = _metadata(header)
        except (OSError, ValueError, RecursionError) as e:
            raise ConfigError(f"{path}: not a valid safetensors file: {e}") from None

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own.

        Raises:
            ConfigError: the dtype is not one of torch's, or the file has changed.
        """
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ConfigError(
                f"{self.path}: {name} has dtype {entry.dtype}, which is not supported"
            )
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            if file.readinto(data.numpy().data) != data.numel():
                raise ConfigError(f"{self.path}: truncated at {name} while it was read")
        return data.view(dtype).reshape(entry.shape)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is there twice in its header")
    return entries


def _entries(header: object, start: int, size: int) -> dict[str, TensorEntry]:
    """The header's tensors, whose bytes must fill the file from `start` to `size` exactly."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    entries = {
        name: _entry(name, value, start) for name, value in header.items() if name != "__metadata__"
    }
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"the bytes of {name} begin at {entry.begin}, expected {end}")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return entries


def _metadata(header: dict) -> dict[str, str]:
    metadata = header.get("__metadata__") or {}
    valid = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not valid:
        raise ValueError("__metadata__ of its header must map keys to texts")
    return metadata


def _entry(name: str, value: object, start: int) -> TensorEntry:
    valid = isinstance(value, dict) and isinstance(value.get("dtype"), str)
    shape, offsets = (value.get("shape"), value.get("data_offsets")) if valid else (None, None)
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"the header's entry of {name} is malformed")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets of {name} are {offsets}")
    entry = TensorEntry(value["dtype"], tuple(shape), start + offsets[0], start + offsets[1])
    dtype = DTYPES.get(entry.dtype)
    if dtype is not None and entry.end - entry.begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} has {entry.end - entry.begin} bytes")
    return entry
