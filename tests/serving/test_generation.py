"""Steps of generations whose events wait already, as they do for a client that does not read."""

import asyncio
import time

import pytest

from et_moe.serving.engine import AsyncEngine
from et_moe.serving.generation import Generation, in_turn
from et_moe.serving.interface import SamplingParams
from et_moe.serving.metrics import Metrics


@pytest.mark.parametrize("count", [1, 3])
def test_a_backlog_leaves_the_others_their_turns(engine, tokenizer, count: int) -> None:
    engine.text = " word" * 500

    async def run() -> tuple[int, int]:
        owner, metrics = AsyncEngine(engine), Metrics(engine.status)
        generations = [
            Generation(owner, tokenizer, [5], SamplingParams(), None, metrics) for _ in range(count)
        ]
        while engine.status().running + engine.status().waiting:
            time.sleep(0.01)  # and not asyncio's: nobody takes the events
        await asyncio.sleep(0.1)
        turns = steps = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        async for _ in in_turn(generations):
            steps += 1
        task.cancel()
        await owner.close()
        return turns, steps

    turns, steps = asyncio.run(run())
    assert steps > 500 * count and turns > steps / 2
