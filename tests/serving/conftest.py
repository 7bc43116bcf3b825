"""A server over a fake engine, in this process, with the demo's tokenizer and chat template."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine

from et_moe.runner.python import Tokenizer
from et_moe.serving.engine import AsyncEngine
from et_moe.serving.served_model import ServedModel
from et_moe.serving.server import create_app

DEMO = Path(__file__).resolve().parents[2] / "examples/qwen3_5_moe/demo_checkpoint"
END = 2045


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


@asynccontextmanager
async def running_app(engine: FakeEngine, tokenizer, program_dir: Path = DEMO, **options):
    """The application while it runs, and a client of it."""

    async def open_model() -> ServedModel:
        return ServedModel.make("demo", AsyncEngine(engine), tokenizer, program_dir)

    app = create_app(open_model, **options)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            client.app = app
            yield client


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
