"""Random changes of FlatBuffers that know the schema: most of what they change is still a buffer
that a reader could take for one.

`Schema` reads the `.fbs` files that ExecuTorch's wheel has; `find_places` walks a buffer by one and
gives every place that a change can be about.
"""

import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import executorch

ROOT = Path(executorch.__path__[0])
WIDTHS = {"byte": 1, "ubyte": 1, "uint8": 1, "bool": 1, "int": 4, "uint": 4, "int32": 4}
WIDTHS |= {"uint32": 4, "long": 8, "int64": 8, "uint64": 8, "double": 8}
MOST_ELEMENTS = 8  # how many elements of a vector are places of their own


@dataclass(frozen=True)
class Field:
    """A field of a table. `kind` is the type of a scalar, the name of a table or union, "string",
    or "[...]" around one of these."""

    name: str
    slot: int
    kind: str


class Schema:
    """The tables of a `.fbs` file and of those that it includes."""

    def __init__(self, file: str) -> None:
        text = (ROOT / file).read_text()
        folder = (ROOT / file).parent
        for included in re.findall(r'include "(.+?)"', text):
            text += (folder / included).read_text()
        text = re.sub(r"//.*", "", text)
        found = re.findall(r"\b(table|enum|union)\s+(\w+)[^{]*\{(.*?)\}", text, re.DOTALL)
        self.root = re.search(r"root_type (\w+)", text)[1]
        self.unions = {
            name: ["NONE", *re.findall(r"\w+", body)]
            for kind, name, body in found
            if kind == "union"
        }
        enums = {name for kind, name, _ in found if kind == "enum"}
        self.tables: dict[str, list[Field]] = {}
        for kind, table, body in found:
            if kind != "table":
                continue
            fields, slot = [], 0
            for name, type_ in re.findall(r"(\w+)\s*:\s*(\[?[\w.]+\]?)", body):
                type_ = type_.replace("executorch_flatbuffer.", "")
                if name == "force_align":
                    continue
                type_ = "byte" if type_ in enums else type_
                if type_ in self.unions:
                    fields.append(Field(f"{name}_type", slot, "byte"))
                    slot += 1
                fields.append(Field(name, slot, type_))
                slot += 1
            self.tables[table] = fields


@dataclass(frozen=True)
class Place:
    """A place in a buffer. `role` is "scalar", "length" (of a vector or string), "offset" (to
    something), "entry" (of a vtable) or "text" (its bytes). `what` names the table and the
    field."""

    role: str
    what: str
    at: int
    width: int


def read(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")


def find_places(schema: Schema, data: bytes, start: int = 0) -> list[Place]:
    """All places of a valid buffer whose root offset is at `start`."""
    return list(_table(schema, data, start + read(data, start, 4), schema.root))


def _entry(data: bytes, table: int, slot: int) -> tuple[int, int]:
    """Where the vtable's entry of a slot is (0 if it has none), and where the field is (or 0)."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * slot >= read(data, vtable, 2):
        return 0, 0
    at = vtable + 4 + 2 * slot
    offset = read(data, at, 2)
    return at, table + offset if offset else 0


def _table(schema: Schema, data: bytes, table: int, name: str) -> Iterator[Place]:
    for field in schema.tables[name]:
        entry, at = _entry(data, table, field.slot)
        what = f"{name}.{field.name}"
        if entry:
            yield Place("entry", what, entry, 2)
        if not at:
            continue
        if field.kind in WIDTHS:
            yield Place("scalar", what, at, WIDTHS[field.kind])
            continue
        yield Place("offset", what, at, 4)
        target, kind = at + read(data, at, 4), field.kind
        if kind in schema.unions:
            _, type_at = _entry(data, table, field.slot - 1)
            kind = schema.unions[kind][read(data, type_at, 1)]
        yield from _value(schema, data, target, kind, what)


def _value(schema: Schema, data: bytes, at: int, kind: str, what: str) -> Iterator[Place]:
    if kind in schema.tables:
        yield from _table(schema, data, at, kind)
        return
    length = read(data, at, 4)
    yield Place("length", what, at, 4)
    if kind == "string":
        yield Place("text", what, at + 4, length)
        return
    element = kind.strip("[]")
    width = WIDTHS.get(element, 4)
    for i in range(min(length, MOST_ELEMENTS) if element in WIDTHS else length):
        place = at + 4 + width * i
        yield Place("scalar" if element in WIDTHS else "offset", f"{what}[]", place, width)
        if element not in WIDTHS:
            yield from _value(schema, data, place + read(data, place, 4), element, what)


def _number(rng: random.Random, data: bytes, place: Place, alike: list[Place]) -> int:
    """Another number for a place: near the old one, that of a place like it, or an extreme."""
    old, most = read(data, place.at, place.width), (1 << 8 * place.width) - 1
    other = rng.choice(alike)
    extremes = (0, 1, 2, 3, 16, 255, most, most >> 1, (most >> 1) + 1, most - 1, most >> 2)
    return (
        rng.choice(
            (
                old + rng.choice((1, -1, 2, -2, 4, 128)),
                old ^ (1 << rng.randrange(8 * place.width)),
                read(data, other.at, other.width),
                rng.choice(extremes),
                rng.choice(extremes),
                old * 2,
            )
        )
        & most
    )


def change(rng: random.Random, data: bytes, places: list[Place]) -> bytes:
    """A copy with one place changed; the kinds of places are equally likely, not the places."""
    what = rng.choice(sorted({(p.role, p.what) for p in places}))
    alike = [p for p in places if (p.role, p.what) == what]
    place, changed = rng.choice(alike), bytearray(data)
    if place.role == "text":
        if place.width:
            at = place.at + rng.randrange(place.width)
            changed[at] = rng.choice((0, 255, changed[at] ^ 1, *b'0:"[]{}-'))
            return bytes(changed)
        place = Place("scalar", place.what, place.at, 1)
    if place.role == "offset" and rng.random() < 0.6:
        # The value of another place, of the same table or of another one.
        pool = alike if rng.random() < 0.5 else [p for p in places if p.role == "offset"]
        other = rng.choice(pool)
        number = (other.at + read(data, other.at, 4) - place.at) & 0xFFFFFFFF
    elif place.role == "entry" and rng.random() < 0.5:
        number = 0
    else:
        number = _number(rng, data, place, alike)
    changed[place.at : place.at + place.width] = number.to_bytes(place.width, "little")
    return bytes(changed)
