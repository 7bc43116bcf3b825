"""Programs and weights that were changed on purpose and sealed again: they may cause an error that
names the file, but never a signal. The loader with sanitizers is tested if it was built.

By default the run is short; a long one, over files that nobody has seen yet, is

    export ET_MOE_FUZZ_SEED=7 ET_MOE_FUZZ_COUNT=100000
    python -m pytest -n 0 tests/runner/test_file_fuzz.py
"""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import toy_programs
from file_fuzzer import FileFuzzer
from mutations import SEED, fuzz_count

COUNT = fuzz_count(300)
BATCH = 200  # files that one process is given
CRASHES = json.loads(Path(__file__).with_name("crashes.json").read_text())
"""Changes that once crashed a reader or a kernel, of every place of a kind, by program."""


@pytest.fixture
def load(build_dir: Path, tmp_path: Path):
    """Loads changed files of a program one after the other and gives how many were refused."""
    sanitized = Path(os.environ.get("ET_MOE_SANITIZE_BUILD_DIR", build_dir / "sanitize"))
    tools = [folder / "tests/runner/load_files" for folder in (sanitized, build_dir)]
    tool = next(path for path in tools if path.is_file())

    def refused(program: Path, kind: str, files: dict[str, bytes]) -> int:
        paths = [tmp_path / f"{name}.{kind}" for name in files]
        for path, data in zip(paths, files.values(), strict=True):
            path.write_bytes(data)
        done = subprocess.run(
            [tool, program / "model.pte", program / "model.ptd"],
            input="".join(f"{kind} {path}\n" for path in paths),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=600,
        )
        answers = done.stdout.splitlines()
        if done.returncode != 0:
            at = paths[len(answers)] if len(answers) < len(paths) else "the end"
            pytest.fail(f"{at}: exit code {done.returncode}: {done.stderr[-4000:]}")
        for path, answer in zip(paths, answers, strict=True):
            other = program / ("model.ptd" if kind == "pte" else "model.pte")
            both = f"{path} with {other}" if kind == "pte" else f"{other} with {path}"
            assert answer.startswith(("ok", f"error: {path}: ", f"error: {both}: ")), answer
            path.unlink()
        return sum(answer.startswith("error") for answer in answers)

    return refused


@pytest.fixture
def program(request, tiny_program: Path, tmp_path: Path) -> Path:
    """The program of a small model, or one of aten ops alone."""
    return tiny_program if request.param == "model" else toy_programs.write(tmp_path)


@pytest.mark.timeout(600 + COUNT)
@pytest.mark.parametrize(
    ("program", "kind"), [("model", "pte"), ("toy", "pte"), ("model", "ptd")], indirect=["program"]
)
def test_random_files(load, program: Path, kind: str) -> None:
    fuzzer = FileFuzzer(kind, (program / f"model.{kind}").read_bytes())
    refused = load(program, kind, {"undamaged": fuzzer.seal(fuzzer.data)})
    assert refused == 0
    for first in range(0, COUNT, BATCH):
        names = [f"{SEED} {i}" for i in range(first, min(first + BATCH, COUNT))]
        files = {name: fuzzer.random_file(random.Random(name)) for name in names}
        refused += load(program, kind, files)
    assert refused > 0.5 * COUNT
    if COUNT >= 100:  # some changes mean nothing
        assert refused < COUNT


@pytest.mark.parametrize(
    ("program", "kind", "entries"),
    [(program, kind, entries) for program in CRASHES for kind, entries in CRASHES[program].items()],
    indirect=["program"],
)
def test_what_once_crashed(load, program: Path, kind: str, entries: list[dict]) -> None:
    fuzzer = FileFuzzer(kind, (program / f"model.{kind}").read_bytes())
    assert load(program, kind, {"undamaged": fuzzer.seal(fuzzer.data)}) == 0
    for entry in entries:
        changed = fuzzer.each(entry["role"], entry["what"], entry["to"])
        files = {f"{entry['what']} {i}": data for i, data in enumerate(changed)}
        assert load(program, kind, files) > 0, entry


@pytest.mark.parametrize("program", ["model", "toy"], indirect=True)
def test_a_file_that_is_sealed_again_is_the_same(program: Path) -> None:
    for kind in ("pte", "ptd"):
        whole = (program / f"model.{kind}").read_bytes()
        fuzzer = FileFuzzer(kind, whole)
        assert fuzzer.seal(fuzzer.data) == whole
