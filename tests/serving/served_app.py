"""The application over a fake engine, with the demo's chat template."""

from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fake_engine import FakeEngine

from et_moe.serving.engine import AsyncEngine
from et_moe.serving.served_model import ServedModel
from et_moe.serving.server import create_app

DEMO = Path(__file__).resolve().parents[2] / "examples/qwen3_5_moe/demo_checkpoint"
END = 2045
"""The demo's token that ends an answer."""


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
