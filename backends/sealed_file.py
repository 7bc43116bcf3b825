"""Writes the files that the runner loads, sealed: any later change of a byte is noticed.

A sealed file ends with a trailer of 24 bytes, little-endian: the magic `ETMOESUM`, the number n of
bytes covered from the start of the file (uint64), and their XXH3 64-bit hash (uint64). In a `.pte`
all bytes before the trailer are covered. In a `.ptd` (ExecuTorch's FlatTensor format) the header is
covered, up to where the first tensor begins, and the hashes of the tensors stand in a named blob,
so that they can be checked in parallel: `CHECKSUMS`, one uint64 per tensor in the order of the
names sorted as bytes.
"""

import contextlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import flatbuffers
import numpy
import torch
import xxhash

from et_moe.backends.atomic_file import atomic_file

MAGIC = b"ETMOESUM"
CHECKSUMS = "et_moe.checksums"
LAYOUT = "et_moe.layout"
"""Name of a uint8 tensor that holds text: in which order the other tensors have their elements."""
FINGERPRINT = "et_moe.fingerprint"
"""Name of a uint8 tensor that holds text: what a program must agree in, `fingerprint` in
pipeline/export.py."""
ALIGNMENT = 128

# ExecuTorch's extension/flat_tensor/serialize: flat_tensor.fbs and flat_tensor_header.h.
_IDENTIFIER, _VERSION = b"FT01", 0
_HEADER_MAGIC, _HEADER_BYTES, _HEADER_ROOM = b"FH01", 40, 48

# c10::ScalarType, by which both a `.pte` and a `.ptd` name dtypes.
SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.bfloat16: 15,
}

Spec = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _trailer(covered: int, digest: int) -> bytes:
    return MAGIC + struct.pack("<QQ", covered, digest)


def write_sealed(path: Path, data: bytes) -> None:
    """Writes `data` with a trailer that covers all of it."""
    with atomic_file(path) as file:
        file.write(data)
        file.write(_trailer(len(data), xxhash.xxh3_64_intdigest(data)))


def check_sealed(data: bytes) -> None:
    """Raises ValueError unless `data` is what `write_sealed` writes."""
    begin = len(data) - len(_trailer(0, 0))
    if begin < 0 or not data.startswith(MAGIC, begin):
        raise ValueError("no checksum at its end: truncated, or not written by `et-moe export`")
    if data[begin:] != _trailer(begin, xxhash.xxh3_64_intdigest(memoryview(data)[:begin])):
        raise ValueError("damaged: checksum mismatch")


def _nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _vector(builder: flatbuffers.Builder, width: int, prepend: Callable, values: list) -> int:
    builder.StartVector(width, len(values), width)
    for value in reversed(values):
        prepend(value)
    return builder.EndVector()


def _table(builder: flatbuffers.Builder, *fields: tuple[Callable, object]) -> int:
    """A table whose fields are (the builder's method that adds it, its value), by slot."""
    builder.StartObject(len(fields))
    for slot, (add, value) in enumerate(fields):
        if value is not None:
            add(slot, value, None)
    return builder.EndObject()


def _named_data(builder: flatbuffers.Builder, name: str, segment: int, entry) -> int:
    layout = None
    if entry is not None:
        dtype, shape = entry
        sizes = _vector(builder, 4, builder.PrependInt32, list(shape))
        order = _vector(builder, 1, builder.PrependUint8, list(range(len(shape))))
        layout = _table(
            builder,
            (builder.PrependInt8Slot, SCALAR_TYPES[dtype]),
            (builder.PrependUOffsetTRelativeSlot, sizes),
            (builder.PrependUOffsetTRelativeSlot, order),
        )
    return _table(
        builder,
        (builder.PrependUOffsetTRelativeSlot, builder.CreateString(name)),
        (builder.PrependUint32Slot, segment),
        (builder.PrependUOffsetTRelativeSlot, layout),
    )


def _flatbuffer(spec: Spec, segments: list[tuple[int, int]]) -> bytes:
    """The FlatTensor table: where each tensor's segment is, and its dtype and shape."""
    builder = flatbuffers.Builder(1 << 16)
    entries = [*spec.items(), (CHECKSUMS, None)]
    named = [_named_data(builder, name, i, entry) for i, (name, entry) in enumerate(entries)]
    named_data = _vector(builder, 4, builder.PrependUOffsetTRelative, named)
    tables = [
        _table(builder, (builder.PrependUint64Slot, o), (builder.PrependUint64Slot, s))
        for o, s in segments
    ]
    root = _table(
        builder,
        (builder.PrependUint32Slot, _VERSION),
        (
            builder.PrependUOffsetTRelativeSlot,
            _vector(builder, 4, builder.PrependUOffsetTRelative, tables),
        ),
        (builder.PrependUOffsetTRelativeSlot, named_data),
    )
    builder.Finish(root, file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _header(spec: Spec) -> tuple[bytes, list[int]]:
    """The file up to the first tensor, and each segment's offset from there."""
    sizes = [_nbytes(*entry) for entry in spec.values()] + [8 * len(spec)]
    segments, end = [], 0
    for size in sizes:
        segments.append((_aligned(end), size))
        end = sum(segments[-1])
    flatbuffer = _flatbuffer(spec, segments)
    base = _aligned(len(flatbuffer) + _HEADER_ROOM)
    # The header stands between the root offset with the identifier, and the tables.
    header = _HEADER_MAGIC + struct.pack(
        "<IQQQQ", _HEADER_BYTES, _HEADER_ROOM, len(flatbuffer), base, end
    )
    root = struct.unpack_from("<I", flatbuffer)[0] + _HEADER_ROOM
    start = struct.pack("<I", root) + flatbuffer[4:8] + header.ljust(_HEADER_ROOM, b"\0")
    return (start + flatbuffer[8:]).ljust(base, b"\0"), [offset for offset, _ in segments]


class PtdWriter:
    """Writes a `.ptd` tensor by tensor, in memory bounded by one tensor.

    Use as a context manager and `write` every tensor of `spec`, in its order. The file appears
    under its name when the block ends; on an exception nothing is left.

    Args:
        path: of the file.
        spec: name to (dtype, shape) of every tensor.
        texts: name to content of the tensors that hold text: `LAYOUT`, `FINGERPRINT`. One without
            content is left out.
    """

    def __init__(self, path: Path, spec: Spec, texts: Mapping[str, str] | None = None) -> None:
        self._spec, self._digests = dict(spec), {}
        self._texts = {
            name: torch.tensor(list(text.encode()), dtype=torch.uint8)
            for name, text in (texts or {}).items()
            if text
        }
        self._spec |= {name: (torch.uint8, tuple(t.shape)) for name, t in self._texts.items()}
        self._header, self._offsets = _header(self._spec)
        self._context = atomic_file(path)

    def __enter__(self) -> "PtdWriter":
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(self._context)
            self._file.write(self._header)
            self._context = stack.pop_all()
        self._end = 0
        return self

    def _append(self, index: int, data: numpy.ndarray) -> None:
        """Writes a segment behind zeros up to where it begins: a pipe cannot seek."""
        self._file.write(bytes(self._offsets[index] - self._end))
        self._file.write(data)
        self._end = self._offsets[index] + data.nbytes

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
        self._append(index, data)

    def __exit__(self, *error) -> bool | None:
        if error[0] is None:
            try:
                self._finish()
            except BaseException as e:
                self._context.__exit__(type(e), e, e.__traceback__)
                raise
        return self._context.__exit__(*error)

    def _finish(self) -> None:
        if len(self._digests) == len(self._spec) - len(self._texts):
            for name, text in self._texts.items():
                self.write(name, text)
        missing = [name for name in self._spec if name not in self._digests]
        if missing:
            raise ValueError(f"{missing[0]} was never written ({len(missing)} missing)")
        names = sorted(self._digests, key=str.encode)
        digests = numpy.array([self._digests[n] for n in names], dtype="<u8")
        self._append(len(self._spec), digests)
        self._file.write(_trailer(len(self._header), xxhash.xxh3_64_intdigest(self._header)))
