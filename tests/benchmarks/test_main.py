"""The command line of the benchmarks."""

import sys
from pathlib import Path

import pytest

from et_moe.benchmarks import __main__ as benchmarks
from et_moe.benchmarks.static import command


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        benchmarks.main()
    return ended.value.code, capsys.readouterr().err


def test_an_output_is_tried_before_the_work(monkeypatch, capsys, tmp_path: Path) -> None:
    done = []
    monkeypatch.setattr(command, "check", lambda *arguments: done.append(arguments) or True)
    for path in (Path("/proc/x"), tmp_path):
        code, error = run(monkeypatch, capsys, "static", "--write", path)
        assert code == 1 and str(path) in error and len(error.splitlines()) == 1
    assert not done
    made = tmp_path / "new" / "x"
    assert run(monkeypatch, capsys, "static", "--write", made)[0] == 0
    assert done[0][0] == made and list(made.parent.iterdir()) == []
