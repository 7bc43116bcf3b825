"""How the runner ends: by a signal, without a reader, and where an output cannot be written."""

import contextlib
import fcntl
import json
import os
import resource
import signal
import subprocess
import termios
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from et_moe.backends.atomic_file import check_writable

CONTEXT = 8192
PIPE = 4096
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(runner, long_program: Path, tmp_path: Path):
    """Starts the runner; its output is a pipe that holds one page, about 1,000 tokens."""
    processes = []

    def run(*flags: str, model: Path = long_program / "model.pte", **options) -> subprocess.Popen:
        command = [runner.binary, f"--model_path={model}"]
        command += [f"--data_path={long_program / 'model.ptd'}", *flags]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipe | options)
        processes.append(process)
        if process.stdout is not None:
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def generate(start: Start, tmp_path: Path) -> Start:
    """Starts a generation that fills the context, and waits until its pipe is full."""

    def run(*flags: str) -> subprocess.Popen:
        outputs = [f"--{name}_path={tmp_path / name}" for name in ("stats", "output_ids")]
        limit = f"--max_new_tokens={CONTEXT}"
        process = start("--prompt_ids=1,2", limit, *outputs, *flags)
        wait_for(lambda: bytes_in(process.stdout) > PIPE - 8, process)
        return process

    return run


def bytes_in(pipe) -> int:
    return array("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def is_writing(folder: Path) -> bool:
    """Whether a temporary file has content; that of a probe is empty and may be gone by now."""
    with contextlib.suppress(FileNotFoundError):
        return any(f.stat().st_size > 4096 for f in folder.glob("*.tmp"))
    return False


def wait_for(happened: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not happened() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    assert happened()


def test_an_interrupt_prints_the_stats_up_to_there(generate: Start, tmp_path: Path) -> None:
    process = generate("--num_iters=3")
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"error: ended by SIGINT\n")
    tokens, observer, *table = output.decode().splitlines()
    stats = json.loads(observer.removeprefix("PyTorchObserver "))
    assert 1000 < stats["generated_tokens"] == len(tokens.split()) < CONTEXT - 2
    assert table[1].split() == ["Generated", str(len(tokens.split())), "tokens"]
    assert not list(tmp_path.iterdir())


def test_a_second_interrupt_ends_at_once(generate: Start, tmp_path: Path) -> None:
    """It must, because there may be nobody who reads what is left to print."""
    process = generate()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # the pipe is full
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_generation_ends_at_once(generate: Start, tmp_path: Path, number: int) -> None:
    process = generate()
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert process.stderr.read().decode() == f"error: ended by {number.name}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ENDING)
def test_temporary_files_are_removed(start: Start, tmp_path: Path, number: int) -> None:
    """The logits of a score are written as they come."""
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([1] * CONTEXT))
    process = start(f"--score_ids_path={ids}", f"--logits_path={tmp_path / 'logits'}")
    wait_for(lambda: is_writing(tmp_path), process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert process.stderr.read().decode() == f"error: ended by {number.name}\n"
    assert list(tmp_path.iterdir()) == [ids]


@pytest.mark.parametrize("later", ["runner", "export"])
def test_temporary_files_of_a_killed_runner_are_removed_by_a_later_run(
    start: Start, tmp_path: Path, later: str
) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([1] * CONTEXT))
    score = (f"--score_ids_path={ids}", f"--logits_path={tmp_path / 'logits'}")
    process = start(*score)
    wait_for(lambda: is_writing(tmp_path), process)
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    if later == "runner":
        start(*score, model=Path("missing")).communicate(timeout=60)
    else:
        check_writable(tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == [ids]


@pytest.mark.parametrize("number", ENDING)
def test_waiting_for_a_prompt_ends(start: Start, long_program, tmp_path, number: int) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start(f"--prompt_file={fifo}", f"--tokenizer_path={long_program / 'tokenizer.json'}")
    with fifo.open("w"):  # this waits until the runner opens it
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number


def test_nohup_is_obeyed(start: Start, tmp_path: Path) -> None:
    process = start(
        "--prompt_ids=1",
        "--max_new_tokens=2000",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stdout.read(1)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60) and process.returncode == 0


def test_a_generation_ends_with_its_reader(generate: Start, tmp_path: Path) -> None:
    """It ends without a message, like any program that SIGPIPE ends; it would go on for hours."""
    process = generate("--num_iters=1000000")
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    assert not list(tmp_path.iterdir())


OUTPUTS = ["output_ids_path", "stats_path", "logprobs_path", "logits_path"]


@pytest.mark.parametrize("flag", OUTPUTS)
def test_an_output_is_tried_before_the_work(start: Start, tmp_path: Path, flag: str) -> None:
    """It is tried even before the model is looked at."""
    prompt = "--score_ids_path=missing" if flag.startswith("log") else "--prompt_ids=1"
    for path in (tmp_path, tmp_path / "missing" / "x", Path("/proc/x")):
        process = start(prompt, f"--{flag}={path}", model=Path("missing"))
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error.decode().startswith(f"error: {path}: cannot be written: ")
    process = start(prompt, f"--{flag}={tmp_path / 'x'}", model=Path("missing"))
    _, error = process.communicate(timeout=60)
    assert error.decode().startswith("error: missing: ") and not list(tmp_path.iterdir())


def test_a_closed_output_is_an_error_and_no_other_file_gets_its_number(
    start: Start, tmp_path: Path
) -> None:
    flags = ("--prompt_ids=1", f"--output_ids_path={tmp_path / 'ids'}")
    process = start(*flags, stdout=None, preexec_fn=lambda: os.close(1))
    _, error = process.communicate(timeout=60)
    message = b"error: the output could not be written: Bad file descriptor\n"
    assert (process.returncode, error) == (1, message)
    assert not list(tmp_path.iterdir())
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2, 3]")
    flags = (f"--score_ids_path={ids}", f"--logprobs_path={tmp_path / 'logprobs'}")
    process = start(*flags, stdout=None, preexec_fn=lambda: os.close(1))  # this run prints nothing
    assert process.wait(timeout=60) == 0
    assert len(json.loads((tmp_path / "logprobs").read_text())) == 2


@pytest.mark.parametrize("flag", OUTPUTS)
def test_outputs_that_cannot_be_written(runner, tiny_program, tmp_path: Path, flag: str) -> None:
    """The path is in a missing folder or names a folder, or the disk is full from some byte on."""
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
