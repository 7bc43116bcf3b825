"""Reads a checkpoint or bundle again and again, each time with one file damaged at random.

It is a process of its own, so that a test notices if it dies by a signal.
Usage: mutate_checkpoint.py checkpoint|bundle DIRECTORY COUNT FILE...
Prints how many copies of each file were read and refused, as JSON.
"""

import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import spec_of, storages
from mutations import SEED, mutate_bytes, mutate_json

from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint


def mutate(rng: random.Random, file: Path, data: bytes) -> bytes:
    """Damages a file, every second time inside of its JSON so that it stays well-formed."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    if file.suffix == ".json":
        return json.dumps(mutate_json(rng, json.loads(data))).encode()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def attempt(kind: str, directory: Path) -> str:
    """Reads everything; what is accepted has the shapes that its configuration implies."""
    try:
        if kind == "bundle":
            source: Bundle | QuantizedCheckpoint = Bundle(directory)
        else:
            unquantized = storages("none", 32, "none")
            source = QuantizedCheckpoint(Checkpoint(directory), unquantized)
        tensors = {name: t for group in source.groups() for name, t in group.items()}
    except (ValueError, OSError) as error:
        assert str(directory) in str(error), repr(error)
        return "refused"
    spec = spec_of(source, torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {name: shape for name, (_, shape) in spec.items()}
    return "read"


def main() -> None:
    torch.set_num_threads(1)
    kind, directory, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    assert attempt(kind, directory) == "read"
    rng = random.Random(SEED)
    outcomes = {}
    for name in sys.argv[4:]:
        file = directory / name
        original = file.read_bytes()
        outcomes[name] = {"read": 0, "refused": 0}
        for _ in range(count):
            file.write_bytes(mutate(rng, file, original))
            outcomes[name][attempt(kind, directory)] += 1
        file.write_bytes(original)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
