"""Random `.pte` and `.ptd` files that are sealed again, so that a change gets past the seal."""

import copy
import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import xxhash
from flatbuffer_fuzzer import Place, Schema, change, find_places, read
from mutations import mutate_json

from et_moe.backends.sealed_file import CHECKSUMS, MAGIC

TRAILER = 24
PROGRAM = Schema("schema/program.fbs")
FLAT_TENSOR = Schema("extension/flat_tensor/serialize/flat_tensor.fbs")
HEADERS = {"pte": (24, 8), "ptd": (40, 8)}
"""Bytes of the header that stands between the identifier and the tables, and where it begins."""


def seal(data: bytes, covered: int) -> bytes:
    digest = xxhash.xxh3_64_intdigest(data[:covered])
    return data + MAGIC + struct.pack("<QQ", covered, digest)


def header_places(kind: str) -> list[Place]:
    """The numbers of the header, and the offset of the root."""
    size, begin = HEADERS[kind]
    places = [Place("scalar", "header", at, 8) for at in range(begin + 8, begin + size, 8)]
    return [*places, Place("scalar", "header", begin + 4, 4), Place("scalar", "root", 0, 4)]


def change_text(rng: random.Random, data: bytes, places: list[Place]) -> bytes:
    """Changes a JSON text that a constant method returns; it must not become longer."""
    texts = [p for p in places if p.role == "text" and p.what == "String.string_val" and p.width]
    place = rng.choice(texts)
    text = data[place.at : place.at + place.width]
    try:
        document = json.loads(text)
    except ValueError:  # an earlier change has damaged this text
        return data
    for _ in range(20):
        changed = json.dumps(mutate_json(rng, document), separators=(",", ":"))
        if len(changed) <= place.width:
            changed = changed.ljust(place.width).encode()
            return data[: place.at] + changed + data[place.at + place.width :]
    return data


def _seal_pte(data: bytes) -> bytes:
    return seal(data, len(data))


def _seal_ptd(original: bytes, places: list[Place]) -> Callable[[bytes], bytes]:
    """A function that seals a changed file with the hashes of what its tables now describe."""
    base = struct.unpack_from("<Q", original, 8 + 24)[0]

    def entries(data: bytes) -> dict[bytes, bytes]:
        """The contents by name, as far as they can be found with the fields where they were."""
        segments = [
            p.at for p in places if p.role == "offset" and p.what == "FlatTensor.segments[]"
        ]
        content = []
        for at in segments:
            table = at + read(data, at, 4)
            fields = table - struct.unpack_from("<i", data, table)[0] + 4
            offset, size = (
                read(data, table + entry, 8) if (entry := read(data, fields + 2 * i, 2)) else 0
                for i in range(2)
            )
            content.append(data[base + offset : base + offset + size])
        names = [p for p in places if p.role == "text"]
        return {data[p.at : p.at + p.width]: c for p, c in zip(names, content, strict=True)}

    def sealed(data: bytes) -> bytes:
        try:
            found = entries(data)
            blob = found.pop(CHECKSUMS.encode())
            digests = b"".join(
                struct.pack("<Q", xxhash.xxh3_64_intdigest(found[name])) for name in sorted(found)
            )
            if len(blob) == len(digests) and data.count(blob) == 1:
                data = data.replace(blob, digests)
        except (struct.error, KeyError, OverflowError, MemoryError):
            pass  # it will be refused before anybody looks at hashes
        return seal(data, base)

    return sealed


class FileFuzzer:
    """Changes of one file, a `.pte` ("pte") or `.ptd` ("ptd")."""

    def __init__(self, kind: str, original: bytes) -> None:
        self._kind, self.data = kind, original[:-TRAILER]
        self.places = find_places(PROGRAM if kind == "pte" else FLAT_TENSOR, self.data)
        self.seal = _seal_pte if kind == "pte" else _seal_ptd(self.data, self.places)

    def random_file(self, rng: random.Random) -> bytes:
        """A sealed copy that differs in one to three places."""
        data = self.data
        while data == self.data:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                data = self._change(rng, data)
        return self.seal(data)

    def each(self, role: str, what: str, number: int) -> Iterator[bytes]:
        """For each place of a kind that does not hold `number`, a sealed copy in which it does."""
        for place in [*self.places, *header_places(self._kind)]:
            old = read(self.data, place.at, place.width)
            if (place.role, place.what) == (role, what) and old != number:
                data = bytearray(self.data)
                data[place.at : place.at + place.width] = number.to_bytes(place.width, "little")
                yield self.seal(bytes(data))

    def _change(self, rng: random.Random, data: bytes) -> bytes:
        kind = rng.random()
        if kind < 0.05:
            return change(rng, data, header_places(self._kind))
        if kind < 0.2 and self._kind == "pte":
            return change_text(rng, data, self.places)
        return change(rng, data, self.places)


def changed_delegate(
    rng: random.Random, original: bytes, edit: Callable[[dict[str, Any]], Any]
) -> bytes:
    """A sealed CUDA program with another description of one of its methods.

    Args:
        edit: takes the old description and gives the new one, or None for another try. What nobody
            reads of the old one is left out before, which makes room.
    """
    data = original[:-TRAILER]
    begin = rng.choice([m.start() for m in re.finditer(rb'\{"format": \d', data)])
    text = data[begin:].decode("latin-1")  # what follows the document is not text
    document, size = json.JSONDecoder().raw_decode(text)
    for ranges in document["code"].values():
        for code in ranges:
            code["kernels"] = [{"sha256": kernel["sha256"]} for kernel in code["kernels"]]
    while True:
        changed = edit(copy.deepcopy(document))
        text = json.dumps(changed)
        if changed not in (None, document) and len(text) <= size:
            return _seal_pte(data[:begin] + text.encode().ljust(size) + data[begin + size :])


def random_delegate(rng: random.Random, original: bytes) -> bytes:
    """A CUDA program with a description of a method that was changed in one to three places."""

    def edit(document: Any) -> Any:
        for _ in range(rng.choice((1, 1, 2, 3))):
            document = mutate_json(rng, document)
        return document

    return changed_delegate(rng, original, edit)
