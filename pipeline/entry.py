"""How a command line ends: with its output written, or with one line that says what is wrong."""

import errno
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from et_moe.backends.cuda.errors import ToolchainError
from et_moe.pipeline.signals import Ended, ending_signals

console = Console(stderr=True)


def _path(text: str | Path) -> Path:
    if not str(text):
        raise typer.BadParameter("expected a path, got an empty text")
    return Path(text)


PATH = {"parser": _path, "metavar": "PATH"}
"""Of options and arguments that take a path. Without it an empty one is the current folder."""


def _show_warning(message, category, *_) -> None:
    """One line on stderr in place of Python's two with a line of code."""
    console.print(f"warning: {message}", style="yellow", soft_wrap=True, markup=False)


def show_error(error: object) -> None:
    """One line on stderr."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        error = f"{os.fsdecode(error.filename)}: {error.strerror}"
    console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)


def _flush_output() -> None:
    """Writes what was printed, where an error is still seen: the interpreter's exit is too late."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:  # for what is still in the buffer
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # as click does where a longer text has no reader
            sys.exit(1)
        raise OSError(error.errno, error.strerror, "standard output") from error


def invoke(app: typer.Typer, **options: object) -> NoReturn:
    """Runs the command that the arguments name, or prints the help where there are none, and exits.
    A wrong use of it ends with one line on stderr and exit code 2."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False, **options) or 0)
    except TyperException as error:
        text = " ".join(error.format_message().split()).replace(": Value error, ", ": ")
        text = re.sub(r"^Invalid value for '([^']*)'", r"\1", text)
        show_error(text.removeprefix("Invalid value: "))
        sys.exit(error.exit_code)


def run(app: typer.Typer) -> None:
    """Runs a command line. A bad input or a machine that lacks a tool ends with one line on stderr
    and exit code 1; SIGTERM and SIGHUP with one line and 128 plus their number."""
    # ExecuTorch imports torchao, which reports the GPU libraries it does without.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.showwarning = _show_warning
    try:
        with ending_signals():
            try:
                invoke(app)
            finally:
                _flush_output()
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == "et_moe":
            raise
        show_error(f"{error}: what this command needs is in et-moe[export] or et-moe[serve]")
        sys.exit(1)
    except (ValueError, OSError, ToolchainError, Ended) as error:
        show_error(error)
        sys.exit(error.exit_code if isinstance(error, Ended) else 1)
