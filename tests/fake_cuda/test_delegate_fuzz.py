"""CUDA programs whose delegate describes its methods otherwise than they were exported.

The files are sealed again. Each must lead to an error that names the file, and never to a signal, a
leak or a call that CUDA forbids.

The run is short by default; a long one is

    export ET_MOE_FUZZ_SEED=7 ET_MOE_FUZZ_COUNT=5000
    python -m pytest -n 0 tests/fake_cuda/test_delegate_fuzz.py
"""

import random
from pathlib import Path

import pytest
from file_fuzzer import changed_delegate, random_delegate
from mutations import SEED, fuzz_count

COUNT = fuzz_count(30)
BATCH = 20  # files that one process is given


@pytest.mark.timeout(600 + 2 * COUNT)
@pytest.mark.parametrize("program", ["cuda", "drafts/cuda"])
def test_random_descriptions(sanitized, programs: Path, tmp_path: Path, program: str) -> None:
    pte, ptd = programs / program / "model.pte", programs / program / "model.ptd"
    original = pte.read_bytes()
    refused = 0
    for first in range(0, COUNT, BATCH):
        paths = [tmp_path / f"{SEED} {i}.pte" for i in range(first, min(first + BATCH, COUNT))]
        for path in paths:
            path.write_bytes(random_delegate(random.Random(path.stem), original))
        lines = [f"pte {path}\n" for path in (pte, *paths)]
        done = sanitized.run("tests/runner/load_files", pte, ptd, stdin="".join(lines))
        answers = done.stdout.splitlines()
        assert done.returncode == 0, (paths[len(answers) - 1], done.stderr[-4000:])
        assert answers[0].startswith("ok")
        report = sanitized.report()
        assert not report["violations"] and not report["leaks"], report
        for path, answer in zip(paths, answers[1:], strict=True):
            assert answer.startswith(("ok", f"error: {path}: ", f"error: {path} with {ptd}: ")), (
                answer
            )
            path.unlink()
        refused += sum(answer.startswith("error") for answer in answers)
    assert 0.3 * COUNT < refused < COUNT


def shape(where: str, sizes: list[int]):
    """A change of the first tensor's shape among inputs, outputs, state or weights."""

    def edit(document: dict) -> dict:
        document[where][0] = {**document[where][0], "shape": sizes}
        document[where][0].pop("min_shape", None)
        return document

    return edit


def output_index(indices: list[int]):
    def edit(document: dict) -> dict:
        for output, index in zip(document["outputs"], indices, strict=True):
            output["index"] = index
        return document

    return edit


def repeated(where: str):
    """The first tensor of a list once more."""

    def edit(document: dict) -> dict:
        document[where].append(document[where][0])
        return document

    return edit


def another(where: str, **fields):
    """Other fields of the first tensor of state or weights, of one of the methods."""

    def edit(document: dict) -> dict:
        document[where][0] = {**document[where][0], **fields}
        return document

    return edit


MOST = 2**31 - 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shape("state", [MOST, MOST, 4]), "has an impossible shape"),
        (shape("weights", [MOST, MOST]), "has an impossible shape"),
        (shape("inputs", [-6]), "has a dimension of -6"),
        (shape("state", [1 << 31]), "has a dimension of 2147483648"),
        (output_index([0, 2]), "has the index 2 of 2"),
        (output_index([1, 1]), "has the index 1 of 2"),
        (output_index([0, -1]), "index is no index of an output"),
        (repeated("state"), "is named twice"),
        (repeated("weights"), "is named twice"),
        (repeated("inputs"), "is named twice"),
        (repeated("outputs"), "is named twice"),
        (another("state", name="elsewhere"), "the state "),
        (another("state", shape=[7, 1], min_shape=[1, 1]), "the state "),
        (another("weights", name="elsewhere"), "elsewhere"),
    ],
)
def test_descriptions_that_do_not_fit(fake, programs, tmp_path, edit, message: str) -> None:
    pte = tmp_path / "model.pte"
    original = (programs / "cuda/model.pte").read_bytes()
    pte.write_bytes(changed_delegate(random.Random(0), original, edit))
    ptd = programs / "cuda/model.ptd"
    done = fake.runner(tmp_path, "--prompt_ids=1,2", ptd=ptd)
    assert done.returncode == 1
    assert done.stderr.startswith((f"error: {pte}: ", f"error: {pte} with {ptd}: ")), done.stderr
    assert message in done.stderr, done.stderr
