"""Writes the files that the runner loads, sealed: any later change of a byte is noticed.

A sealed file ends with a trailer of 24 bytes, little-endian: the magic `ETMOESUM`, the number n of
bytes covered from the start of the file (uint64), and their XXH3 64-bit hash (uint64). In a `.pte`
all bytes before the trailer are covered. In a `.ptd` (ExecuTorch's FlatTensor format) the header is
covered, and the hashes of the tensors stand in a named blob, so that they can be checked in
parallel: `CHECKSUMS`, one uint64 per tensor in the order of the names sorted as bytes.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy
import torch
import xxhash
from executorch.exir._serialize._program import _insert_flatbuffer_header
from executorch.exir._serialize.padding import aligned_size, pad_to
from executorch.exir.scalar_type import ScalarType
from executorch.exir.tensor_layout import TensorLayout
from executorch.extension.flat_tensor.serialize.flat_tensor_schema import (
    DataSegment,
    FlatTensor,
    NamedData,
)
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorHeader,
    _serialize_to_flatbuffer,
)

from et_moe.backends.atomic_file import atomic_file

MAGIC = b"ETMOESUM"
CHECKSUMS = "et_moe.checksums"
ALIGNMENT = 128
_HEADER_LENGTH = aligned_size(FlatTensorHeader.EXPECTED_LENGTH, 16)

SCALAR_TYPES = {
    torch.uint8: ScalarType.BYTE,
    torch.int8: ScalarType.CHAR,
    torch.int32: ScalarType.INT,
    torch.int64: ScalarType.LONG,
    torch.float16: ScalarType.HALF,
    torch.float32: ScalarType.FLOAT,
    torch.bfloat16: ScalarType.BFLOAT16,
}

Spec = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _trailer(covered: int, digest: int) -> bytes:
    return MAGIC + struct.pack("<QQ", covered, digest)


def write_sealed(path: Path, data: bytes) -> None:
    """Writes `data` with a trailer that covers all of it."""
    with atomic_file(path) as file:
        file.write(data)
        file.write(_trailer(len(data), xxhash.xxh3_64_intdigest(data)))


def _nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _header(spec: Spec) -> tuple[bytes, list[int], int]:
    """The file up to the first tensor, each segment's offset from there, and the data's size."""
    sizes = [_nbytes(*entry) for entry in spec.values()] + [8 * len(spec)]
    offsets, end = [], 0
    for size in sizes:
        offsets.append(aligned_size(end, ALIGNMENT))
        end = offsets[-1] + size
    named = [
        NamedData(
            name,
            i,
            TensorLayout(SCALAR_TYPES[dtype], list(shape), list(range(len(shape)))),
        )
        for i, (name, (dtype, shape)) in enumerate(spec.items())
    ]
    named.append(NamedData(CHECKSUMS, len(spec), None))
    segments = [DataSegment(o, s) for o, s in zip(offsets, sizes, strict=True)]
    flatbuffer = bytes(_serialize_to_flatbuffer(FlatTensor(0, segments, named)))
    base = aligned_size(len(flatbuffer) + _HEADER_LENGTH, ALIGNMENT)
    header = FlatTensorHeader(_HEADER_LENGTH, len(flatbuffer), base, end)
    start = _insert_flatbuffer_header(
        flatbuffer, r"FT[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header.to_bytes(), _HEADER_LENGTH)
    )
    return pad_to(start, base), offsets, end


class PtdWriter:
    """Writes a `.ptd` tensor by tensor, in memory bounded by one tensor.

    Use as a context manager and `write` every tensor of `spec`, in its order. The file appears
    under its name when the block ends; on an exception nothing is left.

    Args:
        path: of the file.
        spec: name to (dtype, shape) of every tensor.
    """

    def __init__(self, path: Path, spec: Spec) -> None:
        self._spec, self._digests = dict(spec), {}
        self._header, self._offsets, _ = _header(spec)
        self._context = atomic_file(path)

    def __enter__(self) -> "PtdWriter":
        self._file = self._context.__enter__()
        self._file.write(self._header)
        return self

    def _seek(self, index: int) -> None:
        self._file.seek(len(self._header) + self._offsets[index])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor; ValueError if it is not the one that `spec` has next."""
        index = len(self._digests)
        expected = list(self._spec)[index] if index < len(self._spec) else None
        if name != expected:
            raise ValueError(f"{name}: expected {expected} next")
        if (tensor.dtype, tuple(tensor.shape)) != self._spec[name]:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: got {found}, expected {self._spec[name]}")
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        self._digests[name] = xxhash.xxh3_64_intdigest(data)
        self._seek(index)
        self._file.write(data)

    def __exit__(self, *error) -> bool | None:
        if error[0] is None:
            try:
                self._finish()
            except BaseException as e:
                self._context.__exit__(type(e), e, e.__traceback__)
                raise
        return self._context.__exit__(*error)

    def _finish(self) -> None:
        missing = [name for name in self._spec if name not in self._digests]
        if missing:
            raise ValueError(f"{missing[0]} was never written ({len(missing)} missing)")
        names = sorted(self._digests, key=str.encode)
        self._seek(len(self._spec))
        self._file.write(numpy.array([self._digests[n] for n in names], dtype="<u8").tobytes())
        self._file.write(_trailer(len(self._header), xxhash.xxh3_64_intdigest(self._header)))
