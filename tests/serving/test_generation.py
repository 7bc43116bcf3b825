"""Generations whose events wait already, as they do for a client that does not read."""

import asyncio
import itertools
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


@pytest.mark.parametrize(("together", "bucket", "below"), [(1, "0.5", "0.25"), (2, "0.25", "0.1")])
def test_times_between_tokens_are_those_of_drawing(
    engine, tokenizer, together: int, bucket: str, below: str
) -> None:
    """Ten events that are taken at once; tokens that a call gives share its time."""
    engine.text = " word" * 30

    async def run() -> Metrics:
        owner, metrics = AsyncEngine(engine), Metrics(engine.status)
        begin, calls = time.monotonic(), itertools.count()
        engine.sizes = lambda: together
        engine.clock = lambda: begin + 0.4 * (next(calls) // together)
        params = SamplingParams(max_tokens=10 * together)
        generation = Generation(owner, tokenizer, [5], params, None, metrics)
        while engine.status().running + engine.status().waiting:
            time.sleep(0.01)  # and not asyncio's: nobody takes the events
        assert len([event async for event in generation.events()]) == 10
        generation.close()
        await owner.close()
        return metrics

    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample, _ in asyncio.run(run()).samples()
    }
    name = "et_moe_time_between_tokens_seconds"
    assert found[f"{name}_bucket", bucket] == found[f"{name}_count", None] == 9 * together
    assert found[f"{name}_bucket", below] == 0
    assert found[f"{name}_sum", None] == pytest.approx(9 * 0.4, abs=0.01)
    assert found["et_moe_generated_tokens_total", None] == 10 * together
