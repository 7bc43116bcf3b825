"""Write a safetensors file one tensor at a time, in memory bounded by the largest piece written.

`safetensors.torch.save_file` needs every tensor of a file at once. A quantized bundle or a random
checkpoint of the 35B shape is far larger than that allows, so the header is written from names,
dtypes and shapes alone and the bytes follow piece by piece.

Format: https://huggingface.co/docs/safetensors/index#format
  8 bytes   header length N, unsigned, little-endian
  N bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, offsets relative to the
            end of the header, without holes; "__metadata__" -> {str: str}; padded with spaces so
            that the data starts at a multiple of 8
  the rest  the tensors, row-major, little-endian
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from et_moe.backends.atomic_file import atomic_file

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}

Entry = tuple[torch.dtype, Sequence[int]]


def _encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The 8 length bytes and the padded JSON header of a file holding `entries` in this order."""
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    offset = 0
    for name, (dtype, shape) in entries.items():
        if name == "__metadata__":
            raise ValueError("tensor name '__metadata__' is reserved by the safetensors format")
        if dtype not in DTYPE_NAMES:
            supported = ", ".join(str(d) for d in DTYPE_NAMES)
            raise ValueError(f"tensor '{name}': dtype {dtype} is not one of {supported}")
        if any(size < 0 for size in shape):
            raise ValueError(f"tensor '{name}': shape {tuple(shape)} has a negative size")
        if offset % dtype.itemsize:
            # Readers view the mapped bytes as dtype, which needs an aligned start, and the
            # format allows no padding between tensors.
            raise ValueError(
                f"tensor '{name}': starts at byte {offset}, not a multiple of the {dtype.itemsize} "
                f"bytes of {dtype}; put entries of wider dtypes first"
            )
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Context manager that writes `path` as a safetensors file, one tensor after the other.

    The file appears under its name only when every entry has been written and the block ends
    without an exception; until then the bytes are in a temporary file beside it, which is removed
    when anything fails (a full disk included). An existing `path` is replaced.

        with SafetensorsWriter(path, {"a": (torch.uint8, (4, 2))}) as writer:
            writer.write("a", tensor)

    Args:
        path: the file to write; its directory must exist.
        entries: name -> (dtype, shape) of every tensor, in file order; dtype is one of
            uint8, int8, bfloat16, float16, float32.
        metadata: the header's "__metadata__"; Hugging Face expects {"format": "pt"}.

    Raises:
        ValueError: an unsupported dtype, a negative size, a misaligned entry, or metadata that is
            not text; from `write`, a tensor that is not the next entry or does not match it; at
            the end, entries that were never written.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        for key, value in (metadata or {}).items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"metadata {key!r}: {value!r} is not text; safetensors holds text")
        self.path = Path(path)
        self._header = _encode_header(entries, metadata)
        self._entries = {
            name: (dtype, torch.Size(shape)) for name, (dtype, shape) in entries.items()
        }
        self._remaining: Iterator[str] = iter(self._entries)
        self._context = atomic_file(self.path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._context.__enter__()
        try:
            self._file.write(self._header)
        except OSError as e:
            self._context.__exit__(type(e), e, e.__traceback__)
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor, which must be the next entry and have its dtype and shape."""
        if name in self._entries and tensor.shape != self._entries[name][1]:
            raise ValueError(
                f"tensor '{name}': shape {tuple(tensor.shape)}, "
                f"expected {tuple(self._entries[name][1])}"
            )
        self.write_chunks(name, [tensor])

    def write_chunks(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Write the next entry from pieces that, concatenated along dimension 0, make it up.

        Each piece has the entry's dtype and its shape but for dimension 0; a 0-d entry takes one
        0-d piece. `chunks` may be a generator: one piece is held at a time.
        """
        if self._file is None:
            raise ValueError(f"tensor '{name}': {self.path} is not open for writing")
        expected = next(self._remaining, None)
        if name != expected:
            want = f"'{expected}'" if expected is not None else "no further tensor"
            raise ValueError(f"tensor '{name}': out of order, expected {want}")
        dtype, shape = self._entries[name]
        elements = 0
        for chunk in chunks:
            if chunk.dtype != dtype:
                raise ValueError(f"tensor '{name}': dtype {chunk.dtype}, expected {dtype}")
            if chunk.dim() != len(shape) or chunk.shape[1:] != shape[1:]:
                raise ValueError(
                    f"tensor '{name}': piece of shape {tuple(chunk.shape)} does not fit "
                    f"{tuple(shape)}"
                )
            elements += chunk.numel()
            if elements > shape.numel():
                break
            flat = chunk.detach().cpu().contiguous().reshape(-1)
            self._file.write(flat.view(torch.uint8).numpy().data)
        if elements != shape.numel():
            raise ValueError(
                f"tensor '{name}': got {elements} elements, "
                f"expected {shape.numel()} of shape {tuple(shape)}"
            )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file = None
        missing = next(self._remaining, None)
        if exc is None and missing is not None:
            error = ValueError(f"tensor '{missing}': was never written to {self.path}")
            self._context.__exit__(ValueError, error, None)
            raise error
        self._context.__exit__(exc_type, exc, traceback)
