"""Steps that are timed, logged and reported one by one."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from et_moe.backends.atomic_file import write_file

REPO = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
"""Variables of all commands. Where torch sees no GPU, tests of kernels must not pass in Triton's
interpreter."""


class StepFailed(RuntimeError):
    """Says why a step, or a command of it, failed; `found` goes into the report all the same."""

    def __init__(self, message: str, found: dict | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


class OutOfTime(Exception):
    """A command was stopped at the end of its step's time."""


class NotRun(Exception):
    """Says why a step cannot be run here."""


@dataclasses.dataclass
class Session:
    """What the steps share.

    Attributes:
        folder: the folder that `pack_acceptance.py` made; `manifest` describes its content.
        scratch: the folder for the files of the steps.
        log: the file that gets every command and its output.
        deadline: when the current step must end, on the clock of `time.monotonic`.
    """

    folder: Path
    manifest: dict
    scratch: Path
    log: Path
    quick: bool
    deadline: float

    @property
    def runner(self) -> Path:
        return self.folder / "bin/qwen3_5_moe_runner"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text + "\n")

    def call(self, command: Sequence[str | Path]) -> tuple[int, str]:
        """Runs a command from the repository's root; returns its exit code and its output.

        Raises:
            OutOfTime: it does not end before the deadline; it is interrupted, then killed.
        """
        words = [str(word) for word in command]
        if self.left() <= 0:
            raise OutOfTime(f"not started: {' '.join(words)[:200]}")
        self.note(f"$ {' '.join(w if len(w) < 300 else w[:300] + '...' for w in words)}")
        begin, offset = time.monotonic(), self.log.stat().st_size
        environment = os.environ | ENVIRONMENT
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                words,
                cwd=REPO,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
        try:
            code = process.wait(max(self.left(), 0))
        except subprocess.TimeoutExpired:
            _stop(process)
            self.note(f"[out of time after {time.monotonic() - begin:.1f} s]\n")
            raise OutOfTime(f"stopped: {' '.join(words)[:200]}") from None
        with self.log.open("rb") as log:
            log.seek(offset)
            output = log.read().decode(errors="replace")
        self.note(f"[exit code {code}, {time.monotonic() - begin:.1f} s]\n")
        return code, output

    def run(self, command: Sequence[str | Path]) -> str:
        """Returns the output of a command; raises StepFailed if its exit code is not 0."""
        code, output = self.call(command)
        if code:
            end = output.strip()[-600:]
            raise StepFailed(f"{Path(command[0]).name}: exit code {code}: {end}")
        return output


def _heed_interrupts() -> None:
    """Heeds interrupts again, which shells make their background jobs and all children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen, grace: float = 10) -> None:
    """Interrupts a process, so that it can write what it has, and ends its process group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of the acceptance; `run` returns what it found, or raises.

    Attributes:
        seconds: the time that it gets, without and with --quick.
    """

    name: str
    run: Callable[[Session], dict]
    seconds: tuple[float, float]


def run_step(step: Step, session: Session) -> dict:
    """Runs a step and returns its outcome for the report."""
    begin = time.monotonic()
    outcome: dict = {"name": step.name, "status": "passed", "reason": None}
    session.note(f"===== {step.name}: {session.left():.0f} s")
    try:
        found = step.run(session)
    except NotRun as e:
        outcome |= {"status": "not run", "reason": str(e)}
        found = {}
    except Exception as e:  # the other steps are run whatever it is
        reason = f"out of time: {e}" if isinstance(e, OutOfTime) else str(e)
        if not isinstance(e, (StepFailed, OutOfTime)):
            reason = f"{type(e).__name__}: {e}"
        outcome |= {"status": "failed", "reason": reason}
        found = getattr(e, "found", {})
    outcome["seconds"] = round(time.monotonic() - begin, 2)
    session.note(f"===== {step.name}: {outcome['status']} {outcome['reason'] or ''}\n")
    return outcome | {"found": found}


def run_steps(steps: Sequence[Step], session: Session, report: dict, path: Path) -> None:
    """Runs all steps; `report` is written after each, with `status` once all are done."""
    shares = [step.seconds[session.quick] for step in steps]
    begin = time.monotonic()
    report["steps"] = []
    for i, step in enumerate(steps):
        session.deadline = begin + sum(shares[: i + 1])
        report["steps"].append(run_step(step, session))
        report["seconds"] = round(time.monotonic() - begin, 2)
        if i + 1 == len(steps):
            failed = any(s["status"] == "failed" for s in report["steps"])
            report["status"] = "failed" if failed else "passed"
        write_file(path, (json.dumps(report, indent=1) + "\n").encode())
