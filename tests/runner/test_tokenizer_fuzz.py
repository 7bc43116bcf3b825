"""Random tokenizer.json files: none crashes the C++ tokenizer or keeps it busy, and those that it
accepts give the results of Hugging Face's tokenizers.

By default the run is short; a long one, over files that nobody has seen yet, is

    export ET_MOE_FUZZ_SEED=7 ET_MOE_FUZZ_COUNT=100000
    python -m pytest -n 0 tests/runner/test_tokenizer_fuzz.py
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from mutations import SEED, fuzz_count
from tokenizer_fuzzer import random_file
from tokenizer_reference import start_cli
from tokenizers import Tokenizer

COUNT = fuzz_count(300)
BATCH = 200  # files that one process is given
MAX_SECONDS = 20  # processor time for one file and its texts, with sanitizers


@pytest.fixture
def folder(build_dir: Path) -> Path:
    """The build with AddressSanitizer and UBSan if it has the tokenizer, else the usual one."""
    sanitized = Path(os.environ.get("ET_MOE_SANITIZE_BUILD_DIR", build_dir / "sanitize"))
    has_tokenizer = (sanitized / "tests/runner/tokenizer/tokenizer_cli").is_file()
    return sanitized if has_tokenizer else build_dir


def reference_results(data: bytes, texts: list[str]) -> list[dict[str, Any] | None] | None:
    """The ids and decoded texts; None for a text or a file that the library cannot process."""
    try:
        spec = json.loads(data)
        # Padding and truncation are not tested here, and the library assigns ids in this order.
        spec["padding"] = spec["truncation"] = None
        spec["added_tokens"].sort(key=lambda token: token["id"])
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception:
        return None
    results: list[dict[str, Any] | None] = []
    for text in texts:
        try:
            ids = tokenizer.encode(text).ids
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            results.append({"ids": ids, "text": decoded})
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # it is not derived from Exception
                raise
            results.append(None)
    return results


def check(path: Path, answer: dict[str, Any], data: bytes, texts: list[str]) -> tuple[int, int]:
    """Checks the answer for one file; gives how many texts were encoded and how many compared."""
    assert answer["seconds"] < MAX_SECONDS, (path, answer["seconds"])
    if "error" in answer:
        error = answer["error"]
        assert error.startswith(f"{path}: ") and error.count(str(path)) == 1, (path, error)
        assert len(error) < 1000 and min(error) >= " ", (path, error)
        return 0, 0
    encoded = [i for i, result in enumerate(answer["results"]) if "ids" in result]
    for result in answer["results"]:
        message = result.get("error", "regular expression")
        assert message.startswith("regular expression"), (path, message)
    # The library gets only texts that took few steps; it may take very many for the others.
    right = reference_results(data, [texts[i] for i in encoded])
    if right is None:
        return len(encoded), 0
    for i, expected in zip(encoded, right, strict=True):
        assert expected is None or answer["results"][i] == expected, (path, texts[i])
    return len(encoded), sum(expected is not None for expected in right)


@pytest.mark.timeout(600 + COUNT)
def test_random_files(folder: Path, tmp_path: Path) -> None:
    encoded = compared = refused = 0
    for first in range(0, COUNT, BATCH):
        batch = range(first, min(first + BATCH, COUNT))
        files = [random_file(random.Random(f"{SEED} {i}")) for i in batch]
        paths = [tmp_path / f"{SEED} {i}.json" for i in batch]
        requests = []
        for path, (data, texts) in zip(paths, files, strict=True):
            path.write_bytes(data)
            request = {"path": str(path), "texts": texts, "parse_special": True}
            requests.append(json.dumps(request))
        done = start_cli(folder, "--try", lines=requests, check=False)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode != 0:
            pytest.fail(
                f"{paths[len(answers)]}: exit code {done.returncode}: {done.stderr[-4000:]}"
            )
        for path, answer, (data, texts) in zip(paths, answers, files, strict=True):
            counts = check(path, answer, data, texts)
            encoded, compared = encoded + counts[0], compared + counts[1]
            refused += "error" in answer
            path.unlink()
    # If nearly all files were refused, or nearly none, they would test little.
    assert 0.2 * COUNT < refused < 0.8 * COUNT, refused
    assert compared > 0.9 * encoded > COUNT, (compared, encoded)
