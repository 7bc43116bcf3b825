"""Signals that ask a command to end: it ends as by an error, and removes its temporary files."""

import contextlib
import signal
from collections.abc import Iterator


class Ended(BaseException):
    """A signal asked this process to end.

    Not an Exception, like KeyboardInterrupt: what handles errors must let it pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """As a shell reports a process that the signal killed."""


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Inside the block the first SIGTERM or SIGHUP raises `Ended`; for use in the main thread.

    Further ones are ignored while it removes files: `timeout` and terminals send several. One that
    was ignored before (by nohup) still is.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handled = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]

    def end(number: int, frame: object) -> None:
        for n in handled:
            signal.signal(n, signal.SIG_IGN)
        raise Ended(number)

    before = {n: signal.signal(n, end) for n in handled}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
