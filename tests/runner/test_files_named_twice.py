"""Files that two flags name, and inputs that can be read once only or hold a byte 0."""

import json
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest

from et_moe.backends.atomic_file import write_file


@pytest.fixture
def run(runner, tiny_program: Path, tmp_path: Path):
    """Runs a copy of the tiny program with flags, and returns what came of it."""
    for name in ("model.pte", "model.ptd", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_program / name).read_bytes())

    def run(*flags: str, **options) -> subprocess.CompletedProcess:
        return runner.run(tmp_path, *flags, check=False, **options)

    return run


@pytest.mark.parametrize("name", ["model.pte", "model.ptd", "tokenizer.json", "link", "prompt"])
def test_an_output_is_no_input(run, tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model.pte")
    (tmp_path / "prompt").write_text("x")
    before = (tmp_path / name).read_bytes()
    flags = (f"--tokenizer_path={tmp_path / 'tokenizer.json'}", f"--prompt_file={tmp_path}/prompt")
    done = run(*flags, f"--stats_path={tmp_path / name}")
    assert done.returncode == 1 and not done.stdout
    assert f"--stats_path {tmp_path / name}: the same file as that of --" in done.stderr
    assert (tmp_path / name).read_bytes() == before


def test_two_outputs_are_two_files(run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    for other in ("out", "link", "./out"):
        flags = (f"--output_ids_path={tmp_path}/out", f"--stats_path={tmp_path}/{other}")
        done = run("--prompt_ids=1", *flags)
        assert done.returncode == 1, other
        assert "the same file as that of --output_ids_path" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("--prompt_ids=1", "--output_ids_path=/dev/null", "--stats_path=/dev/null")
    assert done.returncode == 0


def test_an_output_may_be_a_descriptor(run, tmp_path: Path) -> None:
    """It is written to, wherever it leads: to a file without a name, say."""
    before = sorted(tmp_path.iterdir())
    with tempfile.TemporaryFile() as file:
        number = file.fileno()
        done = run("--prompt_ids=1", f"--output_ids_path=/dev/fd/{number}", pass_fds=[number])
        assert done.returncode == 0
        file.seek(0)
        assert json.loads(file.read())
        write_file(Path(f"/dev/fd/{number}"), b"more")
        file.seek(0)
        assert file.read().endswith(b"more")
    assert sorted(tmp_path.iterdir()) == before


def test_a_prompt_from_a_pipe_is_read_once(run, tmp_path: Path) -> None:
    flags = (f"--tokenizer_path={tmp_path / 'tokenizer.json'}", "--prompt_file=/dev/stdin")
    once = run(*flags, input="Hello")
    more = run(*flags, "--warmup=1", "--num_iters=2", input="Hello")
    assert once.returncode == more.returncode == 0
    texts = [done.stdout.split("\nPyTorchObserver")[0] for done in (once, more)]
    assert texts[0] == texts[1]


def test_a_byte_0_does_not_end_a_file(run, tmp_path: Path) -> None:
    ids, tokenizer = tmp_path / "ids.json", tmp_path / "tokenizer.json"
    ids.write_bytes(b"[1,2]\0,3]")
    done = run(f"--score_ids_path={ids}", f"--logprobs_path={tmp_path}/out")
    assert done.returncode == 1 and f"{ids}: not a JSON list of token ids: it has" in done.stderr
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\0}}}")
    done = run("--prompt=x", f"--tokenizer_path={tokenizer}")
    assert done.returncode == 1 and "not JSON: it has a byte 0" in done.stderr


def test_a_limit_on_files_is_an_error_and_leaves_nothing(run, tmp_path: Path) -> None:
    """As `ulimit -f` sets it: the signal of that limit is not ignored from the start."""
    (tmp_path / "ids.json").write_text(json.dumps([1] * 30))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    folder = tmp_path / "folder"
    folder.mkdir()
    flags = (f"--score_ids_path={tmp_path / 'ids.json'}", f"--logits_path={folder / 'out'}")
    done = run(*flags, preexec_fn=limit)
    assert done.returncode == 1 and "cannot be written: File too large" in done.stderr
    assert not os.listdir(folder)
