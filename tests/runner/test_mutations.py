"""Damaged files make the loader and the runner report an error that names the file.

They never cause a signal. This is about accidental damage; what was changed on purpose and sealed
again is the subject of test_file_fuzz.py. What a damaged tokenizer.json does to its loader is
tested in test_tokenizer_files.py.
"""

import json
import random
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorHeader,
    _deserialize_to_flat_tensor,
)
from mutations import SEED, fuzz_count, mutate_bytes, mutate_json

MUTATIONS = fuzz_count(2000)


def mutated_files(folder: Path, original: bytes, count: int, seed: int) -> list[Path]:
    """`count` files that each differ from the original."""
    rng = random.Random(f"{SEED} {seed}")
    paths = []
    while len(paths) < count:
        data = mutate_bytes(rng, original)
        if data != original:
            paths.append(folder / f"{len(paths)}")
            paths[-1].write_bytes(data)
    return paths


@pytest.fixture
def load(build_dir: Path, tiny_program: Path):
    """Gives the answers of `load_files`: ids, or what an error says after the file's name."""

    def answers(kind: str, paths: list[Path]) -> list[list[int] | str]:
        command = [build_dir / "tests" / "runner" / "load_files"]
        command += [tiny_program / "model.pte", tiny_program / "model.ptd"]
        lines = "".join(f"{kind} {path}\n" for path in paths)
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, errors="replace", timeout=600
        )
        found = done.stdout.splitlines()
        assert done.returncode == 0, f"{done.returncode} after {len(found)} files: {done.stderr}"
        assert len(found) == len(paths)
        results: list[list[int] | str] = []
        for path, line in zip(paths, found, strict=True):
            if line.startswith("ok"):
                results.append([int(i) for i in line.split()[1:]])
            else:
                assert line.startswith(f"error: {path}: "), line
                results.append(line.removeprefix(f"error: {path}: "))
        return results

    return answers


def test_mutated_programs(load, tiny_program: Path, tmp_path: Path) -> None:
    """The seal covers all bytes, so no change is accepted."""
    original = tiny_program / "model.pte"
    paths = mutated_files(tmp_path, original.read_bytes(), MUTATIONS, seed=1)
    (undamaged, *answers) = load("pte", [original, *paths])
    assert len(undamaged) == 3
    assert all(isinstance(answer, str) for answer in answers)


def covered_bytes(data: bytes) -> list[tuple[int, int]]:
    """The ranges of a `.ptd` that mean something: all but the padding between tensors."""
    header = FlatTensorHeader.from_bytes(data[8:])
    flatbuffer = data[: header.flatbuffer_offset + header.flatbuffer_size]
    base = header.segment_base_offset
    ranges = [(0, base), (base + header.segment_data_size, len(data))]
    for segment in _deserialize_to_flat_tensor(flatbuffer).segments:
        ranges.append((base + segment.offset, base + segment.offset + segment.size))
    return ranges


def test_mutated_weights(load, tiny_program: Path, tmp_path: Path) -> None:
    """What is accepted differs in padding alone, and the program gives the same tokens."""
    original = tiny_program / "model.ptd"
    whole = original.read_bytes()
    ranges = sorted(covered_bytes(whole))
    paths = mutated_files(tmp_path, whole, MUTATIONS, seed=2)
    padding = next(end for (_, end), (begin, _) in pairwise(ranges) if end < begin)
    paths.append(tmp_path / "padding")
    paths[-1].write_bytes(whole[:padding] + b"\x01" + whole[padding + 1 :])
    (undamaged, *answers) = load("ptd", [original, *paths])
    assert answers[-1] == undamaged
    for path, answer in zip(paths, answers, strict=True):
        if not isinstance(answer, str):
            data = path.read_bytes()
            assert answer == undamaged and len(data) == len(whole)
            assert all(data[begin:end] == whole[begin:end] for begin, end in ranges)
    assert sum(isinstance(answer, str) for answer in answers) > 0.9 * MUTATIONS


def test_mutated_id_files(load, tmp_path: Path) -> None:
    """A file is accepted only if Python reads the same ids from it."""
    ids = [1, 20, 300, -4, 0, 262]
    paths = mutated_files(tmp_path, json.dumps(ids).encode(), MUTATIONS, seed=3)
    rng = random.Random(SEED)
    for path in paths[::2]:
        document = mutate_json(rng, mutate_json(rng, ids))
        path.write_text(json.dumps(document), errors="surrogatepass")
    answers = load("ids", paths)
    for path, answer in zip(paths, answers, strict=True):
        if not isinstance(answer, str):
            text = path.read_bytes().partition(b"\x00")[0]  # the parser's end of input
            assert answer == json.loads(text)
    accepted = sum(isinstance(answer, list) for answer in answers)
    assert 0.1 * MUTATIONS < accepted < 0.9 * MUTATIONS


FLAGS = {
    "model.pte": "model_path",
    "model.ptd": "data_path",
    "tokenizer.json": "tokenizer_path",
    "ids.json": "score_ids_path",
    "prompts": "prompts_path",
}
PROMPTS = {"prompt_ids": [1, 20, 262], "top_p": 0.5, "seed": 7}, {"prompt": "a b", "min_p": 0.1}
OWN = {
    "ids.json": b"[1, 20, 30, 4, 0, 262]",
    "prompts": "\n".join(json.dumps(line | {"max_new_tokens": 2}) for line in PROMPTS).encode(),
}
"""Files that no program folder has."""


@pytest.mark.parametrize("name", FLAGS)
def test_mutated_files_through_the_runner(
    runner, tiny_program: Path, tmp_path: Path, name: str
) -> None:
    """It ends with exit code 0 and all output, or with a message that names the file and none."""
    original = OWN[name] if name in OWN else (tiny_program / name).read_bytes()
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "output.json"
    for path in mutated_files(tmp_path, original, fuzz_count(30), seed=4):
        flags = {n: f"--{FLAGS[n]}={tiny_program / n}" for n in ("model.pte", "model.ptd")}
        flags[name] = f"--{FLAGS[name]}={path}"
        if name == "ids.json":
            flags["output"] = f"--logprobs_path={output}"
        elif name == "prompts":
            flags["output"] = f"--output_ids_path={output}"
            flags["tokenizer"] = f"--tokenizer_path={tiny_program / 'tokenizer.json'}"
        else:
            flags |= {"output": f"--output_ids_path={output}", "prompt": "--prompt_ids=1,2"}
        done = subprocess.run(
            [runner.binary, *flags.values()], capture_output=True, text=True, errors="replace"
        )
        assert done.returncode in (0, 1), (path, done.returncode, done.stderr)
        if done.returncode == 0:
            assert json.loads(output.read_text())
            output.unlink()
        else:
            assert done.stderr.splitlines()[-1].startswith("error: ")
            assert str(path) in done.stderr or "token" in done.stderr, done.stderr
        assert not list(output.parent.iterdir())
