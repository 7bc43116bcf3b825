"""What `et-moe` says of a machine that lacks something."""

import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from et_moe.pipeline import cli

End = Callable[..., tuple[int, str]]


@pytest.fixture
def export(monkeypatch, capfd, tmp_path: Path) -> End:
    """Runs `et-moe export` of a shape without weights; gives exit code and last line of stderr."""

    def run(*options: object) -> tuple[int, str]:
        command = ["et-moe", "export", "--preset", "tiny", "--graph-only", *map(str, options)]
        monkeypatch.setattr(sys, "argv", [*command, "--output-dir", str(tmp_path / "program")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error = capfd.readouterr().err
        assert "Traceback" not in error
        return ended.value.code, error.splitlines()[-1]

    return run


CUDA = ("--backend", "cuda", "--cuda-arch", "sm_90", "--no-cache")


def test_a_missing_tool_is_one_line(export: End, monkeypatch, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    assert export(*CUDA) == (1, "error: g++ not found: a C++ compiler is needed")
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_the_interpreter_is_one_line(export: End, monkeypatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    message = "cannot compile for CUDA under Triton's interpreter: unset TRITON_INTERPRET"
    assert export(*CUDA) == (1, f"error: {message}")


def test_a_machine_without_homes_exports(export: End, monkeypatch, tmp_path: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert os.path.expanduser("~") == "~"
    code, last = export()
    assert code == 0 and last.endswith(" read for a decoded token")
    assert (tmp_path / "program" / "model.pte").is_file()


def test_the_shortest_context(export: End, tmp_path: Path) -> None:
    code, last = export("--max-seq-len", 2)
    assert (code, last) == (1, "error: --max-seq-len 2: expected 3 to 4096 (the model's limit)")
    assert not list(tmp_path.iterdir())
    assert export("--max-seq-len", 3)[0] == 0


PATHS = [
    "quantize --output-dir",
    "quantize --output-dir x --model-dir",
    "export --output-dir",
    "export --output-dir x --model-dir",
    "export --output-dir x --prequantized",
    "export --output-dir x --cache-dir",
    "make-checkpoint --output-dir",
    "inspect",
    "eval --model-dir",
    "eval --model-dir x --program-dir",
    "eval --model-dir x --program-dir x --text",
    "eval --model-dir x --program-dir x --text x --runner",
    "eval --program-dir x --text x --reference-program",
]


@pytest.mark.parametrize("command", PATHS)
def test_a_path_that_is_empty_is_refused(monkeypatch, capfd, tmp_path: Path, command: str) -> None:
    """It is not the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["et-moe", *command.split(), ""])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.endswith(": expected a path, got an empty text\n")
    assert not list(tmp_path.iterdir())


def python(code: str, **options) -> tuple[int, str]:
    """The exit code and stderr of a process that runs `code` with `cli` imported."""
    command = [sys.executable, "-c", f"import sys; from et_moe.pipeline import cli; {code}"]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, **options)
    return done.returncode, done.stderr


PRINT = "cli.app = lambda *_, **__: print('x'); cli.main()"


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    message = "error: standard output: No space left on device\n"
    with Path("/dev/full").open("w") as full:
        assert python(PRINT, stdout=full) == (1, message)


def test_an_output_without_a_reader_is_no_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert python(PRINT, stdout=writer) == (1, "")
    os.close(writer)


@pytest.mark.parametrize(
    "command",
    ["inspect /missing", "eval --model-dir /missing --program-dir /missing --text /missing"],
)
def test_a_closed_output_is_found_before_the_work(command: str) -> None:
    code = f"sys.argv[1:] = {command.split()}; cli.main()"
    expected = (1, "error: standard output is closed\n")
    assert python(code, preexec_fn=lambda: os.close(1)) == expected
