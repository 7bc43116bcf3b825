"""Fixtures that run the command line in this process."""

import sys
from collections.abc import Callable

import pytest

from et_moe.pipeline import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs `et-moe ARGUMENTS` in this process; gives exit code, stdout, and stderr in one line."""

    def et_moe(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["et-moe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, " ".join(err.split())

    return et_moe


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Runs a command that must fail with a message of these parts."""

    def check(*arguments: object, parts: list[object], code: int = 1) -> str:
        ended, out, err = run(*arguments)
        assert ended == code, err
        for part in parts:
            assert str(part) in err, err
        assert "Traceback" not in err and not out
        return err

    return check
