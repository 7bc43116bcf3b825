"""Many requests that begin alike: how much of what they share is taken from the prefix cache."""

import random
import select
from pathlib import Path

import pytest

from et_moe.serving.engine import load_engine
from et_moe.serving.interface import SamplingParams

REQUESTS = 64


def answers(program: Path, prompts: list[list[int]], **options) -> tuple[list[list[int]], int]:
    """The tokens that each request gets, all submitted at once, and how many tokens of their
    prompts came from the cache."""
    engine = load_engine(program, max_sequences=3, **options)
    tokens, cached = ask(engine, prompts, SamplingParams(temperature=0.0, max_tokens=2))
    engine.close()
    return tokens, cached


def ask(engine, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], int]:
    """The same of an engine that may have served others before."""
    found = {engine.submit(prompt, params): [] for prompt in prompts}
    open_requests, cached = set(found), 0
    while open_requests:
        select.select([engine.fileno()], [], [], 60)
        for event in engine.take_events():
            assert event.finish_reason in (None, "length", "stop"), event.error
            found[event.request_id] += event.token_ids
            cached += event.cached_tokens
            if event.finish_reason is not None:
                open_requests.remove(event.request_id)
    return list(found.values()), cached


@pytest.mark.parametrize("shared", [7936, 8036])  # whole pages of 64 tokens, and 36 more
def test_reuse(long_program: Path, shared: int) -> None:
    draw = random.Random(shared)
    prefix = draw.choices(range(1, 256), k=shared)
    prompts = [prefix + draw.choices(range(1, 256), k=100) for _ in range(REQUESTS)]
    tokens, cached = answers(long_program, prompts)
    assert cached >= 0.95 * shared * (REQUESTS - 1), cached
    few = prompts[:2]
    assert answers(long_program, few, prefix_cache=False) == (tokens[:2], 0)


@pytest.mark.parametrize(("program", "left"), [("plain", 0), ("score", 128)])
def test_prompts_with_log_probabilities(scored_model, program: str, left: int) -> None:
    """They are fed whole, in pieces of a page; the next prompt goes on from the last full one. Fed
    token by token, which is computed in another way, they leave nothing."""
    prompt = random.Random(1).choices(range(1, 256), k=150)
    engine = load_engine(scored_model / program, max_sequences=2)
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=1)
    first, again = (ask(engine, [prompt], params) for _ in range(2))
    assert first == again and first[1] == 0
    plain = SamplingParams(temperature=0.0, max_tokens=4)
    assert ask(engine, [prompt], plain) == (first[0], left)
    engine.close()
