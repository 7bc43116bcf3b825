"""Outputs of the runner that cannot be written: an error, and nothing left behind."""

import json
import resource
import signal
import subprocess
from pathlib import Path

import pytest

OUTPUTS = ["output_ids_path", "stats_path", "logprobs_path", "logits_path"]


@pytest.mark.parametrize("flag", OUTPUTS)
def test_outputs_that_cannot_be_written(runner, tiny_program, tmp_path: Path, flag: str) -> None:
    """A missing folder, a folder of that name, and a disk that is full from some byte on."""
    ids, folder = tmp_path / "ids.json", tmp_path / "folder"
    ids.write_text(json.dumps([1] * 30))
    folder.mkdir()
    prompt = f"--score_ids_path={ids}" if flag.startswith("log") else "--prompt_ids=1"
    before = sorted(tmp_path.iterdir())

    def run(path: Path, limit: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess:
        def full_disk() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        command = [runner.binary, f"--model_path={tiny_program / 'model.pte'}"]
        command += [f"--data_path={tiny_program / 'model.ptd'}", prompt, f"--{flag}={path}"]
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=full_disk)

    for path in (tmp_path / "missing" / "x", folder, Path("/proc/x"), ids / "x"):
        done = run(path)
        assert done.returncode == 1 and f"error: {path}: cannot be written: " in done.stderr
    for limit in (0, 1, 50):
        done = run(tmp_path / "out", limit)
        assert done.returncode == 1, done.stderr
        assert f"error: {tmp_path / 'out'}: cannot be written: File too large" in done.stderr
        assert sorted(tmp_path.iterdir()) == before
    assert run(tmp_path / "out").returncode == 0 and (tmp_path / "out").stat().st_size > 50


def test_standard_output_that_cannot_be_written(runner, tiny_program: Path) -> None:
    command = [runner.binary, f"--model_path={tiny_program / 'model.pte'}"]
    command += [f"--data_path={tiny_program / 'model.ptd'}", "--prompt_ids=1"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "error: the output could not be written" in done.stderr
