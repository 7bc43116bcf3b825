"""Servers as processes."""

import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


class Server:
    """The process of a command that serves, and what it has said on stderr."""

    def __init__(self, *command) -> None:
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self.port = 0
        while not self.port:
            line = self.process.stderr.readline()
            assert line, self.log
            self.log += line
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log += line

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def ended(self) -> int:
        """The exit code of a process that ends by itself, all of whose log is there then."""
        code = self.process.wait(60)
        self._reader.join()
        return code

    def wait_for_line(self, pattern: str) -> str:
        """The first group of a line in the log."""
        for _ in range(2000):
            if found := re.search(pattern, self.log):
                return found[1]
            time.sleep(0.01)
        pytest.fail(f"no {pattern!r} in {self.log}")

    def wait_for_draining(self) -> httpx.Response:
        """What a new connection is told of the server's health once a signal has come."""
        while (health := httpx.get(f"{self.url}/health", timeout=30)).status_code == 200:
            pass
        return health

    def chat(self, words: str, **fields) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": words}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)

    @contextmanager
    def stream(self, words: str, path: str = "/v1/chat/completions", **fields):
        body = {"messages": [{"role": "user", "content": words}], "stream": True, **fields}
        with httpx.stream("POST", self.url + path, json=body, timeout=30) as response:
            yield response

    def metric(self, name: str) -> float:
        """The value of a metric; 0 where nothing has been counted under these labels."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)
        assert found or "{" in name, f"no metric {name}"
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float) -> None:
        for _ in range(500):
            if self.metric(name) == value:
                return
            time.sleep(0.01)
        pytest.fail(f"{name} is {self.metric(name)}, expected {value}")


def fake_server(seconds: float, drain: float) -> Server:
    """A server whose engine takes `seconds` for a token; requests have `drain` seconds to end."""
    return Server(sys.executable, FAKE_SERVER, str(seconds), str(drain))
