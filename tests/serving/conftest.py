"""A server over a fake engine, in this process, with the demo's tokenizer and chat template.

And the demo's program, for those that need a model."""

import asyncio
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from files import made_once
from page_driver import chromium, opened
from served_app import DEMO, END, running_app
from server_process import Server

from et_moe.runner.python import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(DEMO / "tokenizer.json"))


@pytest.fixture
def engine(tokenizer):
    """A fake engine whose answer is `engine.text`."""
    fake = FakeEngine(lambda *_: [*tokenizer.encode(fake.text, True), END])
    fake.text = "</think>\n\nHello."
    yield fake
    fake.stop()


@pytest.fixture
def ask(engine, tokenizer):
    """Sends one request; `ask(path, body)` or `ask(path)` returns the response."""

    def send(path: str, body=None, **options) -> httpx.Response:
        async def run() -> httpx.Response:
            async with running_app(engine, tokenizer) as client:
                if body is None:
                    return await client.get(path, **options)
                content = {"content": body} if isinstance(body, bytes) else {"json": body}
                headers = {"Content-Type": "application/json"} | options.pop("headers", {})
                return await client.post(path, headers=headers, **content, **options)

        return asyncio.run(run())

    return send


@pytest.fixture(scope="session")
def demo_program(tmp_path_factory) -> Path:
    """The program of the demo checkpoint, for the CPU. Tests leave it as it is."""

    def make(folder: Path) -> None:
        command = ["et-moe", "export", "--model-dir", DEMO, "--output-dir", folder]
        subprocess.run(command, check=True, capture_output=True, timeout=300)

    return made_once(tmp_path_factory, "served_demo_program", make)


@pytest.fixture(scope="module")
def demo_server(demo_program: Path):
    """A process that serves `demo_program`."""
    running = Server("et-moe", "serve", demo_program, "--port", "0", "--model-name", "demo")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Opens the page of a server; `open_page(url, width, height)`, as `opened` says."""
    with ExitStack() as stack:
        yield lambda *where: stack.enter_context(opened(browser, *where))
