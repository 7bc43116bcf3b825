"""`et-moe serve` as a process of its own, for benchmarks."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx


@contextmanager
def served(program: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """The process and the port on loopback of a server, once it answers; asked to end behind.

    Raises:
        ValueError: it ends before it answers; with what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "et_moe.cli", "serve", program]
    command += ["--port", str(port), *flags]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stderr=log) as process:
        try:
            while process.poll() is None:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                time.sleep(0.1)
            else:
                log.seek(0)
                raise ValueError(log.read().decode())
            yield process, port
        finally:
            process.terminate()
