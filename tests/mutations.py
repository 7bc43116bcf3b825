"""Random damage to files: bits, bytes, and values of JSON documents.

Tests that damage files at random do it a few times. For a long run, with files that nobody has seen
yet, set ET_MOE_FUZZ_SEED and ET_MOE_FUZZ_COUNT.
"""

import copy
import os
import random
from typing import Any

SEED = int(os.environ.get("ET_MOE_FUZZ_SEED", "0"))

JSON_VALUES = (None, True, False, -1, 0, 3, 1 << 31, 1 << 63, 1 << 70, 0.5, -0.0, 1e308)
JSON_VALUES += (float("nan"), float("inf"), "", "\x00", "..", "../x", "\ud800", "\U0001f600", "9")
JSON_VALUES += ([], {}, [[[]]])


def fuzz_count(usual: int) -> int:
    """How many files a test damages: as many as the environment says, else `usual`."""
    return int(os.environ.get("ET_MOE_FUZZ_COUNT", usual))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One change: a truncation, flipped bits, or a piece overwritten, inserted, removed, repeated.

    The first KB, where most formats have their header, is hit more often than the rest.
    """
    begin = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 1024))
    end = begin + rng.choice((1, 1, 2, 4, 8, 64))
    noise = rng.choice((b"\x00", b"\xff", b"9", rng.randbytes(1))) * (end - begin)
    changed = bytearray(data)
    match rng.randrange(8):
        case 0:
            return data[:begin]
        case 1:
            changed[begin:end] = noise
        case 2:
            changed[begin:begin] = noise
        case 3:
            del changed[begin:end]
        case 4:
            changed[begin:begin] = data[begin:end]
        case _:
            for _ in range(rng.randint(1, 3)):
                changed[rng.randrange(begin, min(end, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutate_json(rng: random.Random, document: Any) -> Any:
    """A copy of a JSON document with one value replaced, removed, repeated or renamed."""
    document = copy.deepcopy(document)
    node, parent, key = document, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    if parent is None:
        return rng.choice(JSON_VALUES)
    action = rng.random()
    if action < 0.6:
        parent[key] = copy.deepcopy(rng.choice(JSON_VALUES))
    elif action < 0.8:
        del parent[key]
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(node))
    else:
        other = rng.choice([f"{key}x", key[1:], *parent])
        parent[other] = parent.pop(key)
    return document
