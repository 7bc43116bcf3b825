"""The engine as Python sees it: requests, parameters, events, and streams on an event loop."""

import asyncio
import select
from pathlib import Path

import numpy as np
import pytest

from et_moe.serving.engine import AsyncEngine, load_engine
from et_moe.serving.interface import EngineBrokenError, Event, QueueFullError, SamplingParams

CONTEXT, VOCABULARY = 32, 264
PROMPT = [58, 151, 241, 26, 230]  # no end of sequence follows soon
SAMPLED = {"temperature": 0.9, "seed": 5}
ALL = b"\xff" * (VOCABULARY // 8)


def mask(*token_ids: int) -> bytes:
    bits = bytearray(VOCABULARY // 8)
    for token_id in token_ids:
        bits[token_id // 8] |= 1 << token_id % 8
    return bytes(bits)


class Client:
    """Submits requests and waits for their events."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self._events: dict[int, list[Event]] = {}

    def submit(self, prompt: list[int] = PROMPT, **params) -> int:
        params = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True} | params
        return self.engine.submit(prompt, SamplingParams(**params))

    def events(self, request_id: int, tokens: int | None = None) -> list[Event]:
        """All events of a request, once it has ended or has so many tokens."""
        while True:
            events = self._events.setdefault(request_id, [])
            if events and events[-1].finish_reason:
                return events
            if tokens is not None and sum(len(e.token_ids) for e in events) >= tokens:
                return events
            assert select.select([self.engine.fileno()], [], [], 60)[0], "nothing for a minute"
            for event in self.engine.take_events():
                self._events.setdefault(event.request_id, []).append(event)

    def generate(self, prompt: list[int] = PROMPT, **params) -> list[int]:
        events = self.events(self.submit(prompt, **params))
        assert events[-1].finish_reason in ("stop", "length"), events[-1]
        return tokens_of(events)


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@pytest.fixture(scope="module")
def client(tiny_program: Path):
    engine = load_engine(tiny_program, max_sequences=2, max_waiting=3)
    yield Client(engine)
    engine.close()


def test_what_a_program_says(client) -> None:
    info = client.engine.info
    assert (info.max_seq_len, info.vocab_size, info.backend) == (CONTEXT, VOCABULARY, "cpu")
    assert info.page_size == 64 and info.eos_token_ids
    status = client.engine.status()
    assert (status.waiting, status.running, status.max_sequences, status.broken) == (0, 0, 2, None)


@pytest.mark.parametrize("params", [{}, SAMPLED, {**SAMPLED, "top_k": 5, "top_p": 0.7}])
def test_tokens_are_those_of_the_runner(client, runner, tiny_program, params: dict) -> None:
    flags = [f"--{name}={value}" for name, value in ({"temperature": 0} | params).items()]
    expected = runner.generate(tiny_program, PROMPT, 6, *flags)
    found = client.generate(ignore_eos=False, **params)
    assert found == expected


@pytest.mark.parametrize(
    "params",
    [
        {},
        SAMPLED,
        {"temperature": 2.5, "seed": -7},
        {**SAMPLED, "top_k": 4},
        {**SAMPLED, "top_p": 0.6},
        {**SAMPLED, "top_k": 20, "top_p": 0.8},
        {**SAMPLED, "top_k": VOCABULARY},
    ],
)
def test_a_token_drawn_on_the_host_is_that_of_the_op(client, params: dict) -> None:
    """A mask that allows all tokens makes the host draw."""
    guided = client.submit(guided=True, max_tokens=8, **params)
    for _ in range(8):
        client.engine.allow(guided, ALL)
    assert tokens_of(client.events(guided)) == client.generate(max_tokens=8, **params)


def test_ends(client) -> None:
    tokens = client.generate(max_tokens=8)
    assert len(tokens) == 8
    stop = client.events(client.submit(stop_token_ids=(tokens[3],)))
    assert tokens_of(stop) == tokens[: tokens.index(tokens[3]) + 1]
    assert stop[-1].finish_reason == "stop"
    for room in (1, 2):
        for most in (None, room, 100, np.int64(100)):
            full = client.events(client.submit([7] * (CONTEXT - room), max_tokens=most))
            assert len(tokens_of(full)) == room and full[-1].finish_reason == "length"
    for prompt in (PROMPT, [7] * CONTEXT):
        nothing = client.events(client.submit(prompt, max_tokens=0, prompt_logprobs=0))
        assert tokens_of(nothing) == [] and nothing[-1].finish_reason == "length"
        assert len(nothing[-1].prompt_logprobs) == len(prompt)


def test_an_end_of_sequence_id(client) -> None:
    eos = client.engine.info.eos_token_ids[0]
    biased = {"logit_bias": {eos: 100.0}}
    ended = client.events(client.submit(ignore_eos=False, **biased))
    assert tokens_of(ended) == [eos] and ended[-1].finish_reason == "stop"
    assert client.generate(**biased) == [eos] * 6


def test_penalties_and_bias(client) -> None:
    favoured = {"logit_bias": {9: 500.0, 10: 490.0}}
    assert client.generate(**favoured) == [9] * 6
    assert client.generate(**favoured, presence_penalty=20.0) == [9, 10, 9, 9, 9, 9]
    assert client.generate(**favoured, frequency_penalty=7.0) == [9, 9, 10, 9, 10, 9]
    # Of the penalties only that for repetition counts the prompt.
    assert client.generate([9], **favoured, presence_penalty=20.0)[0] == 9
    assert client.generate([9], **favoured, repetition_penalty=2.0)[0] == 10
    assert len(set(client.generate(repetition_penalty=1e6, max_tokens=20))) == 20


def test_min_p_keeps_likely_tokens(client) -> None:
    hot = {"max_tokens": 1, "temperature": 50.0, "logit_bias": {9: 100.0, 10: 100.0}}
    assert {client.generate(seed=seed, min_p=0.5, **hot)[0] for seed in range(20)} == {9, 10}
    assert len({client.generate(seed=seed, **hot)[0] for seed in range(20)}) > 5
    assert client.generate(min_p=1.0, **SAMPLED) == client.generate()


def test_logprobs(client, runner, tiny_program) -> None:
    events = client.events(client.submit(logprobs=3, prompt_logprobs=0))
    tokens = tokens_of(events)
    assert tokens == client.generate()
    logprobs = [logprob for event in events for logprob in event.logprobs or ()]
    (prompt,) = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
    expected = runner.score(tiny_program, PROMPT + tokens)
    assert prompt[0] is None and len(prompt) == len(PROMPT)
    assert [p.logprob for p in prompt[1:]] == pytest.approx(expected[: len(PROMPT) - 1], abs=1e-3)
    assert [p.logprob for p in logprobs] == pytest.approx(expected[len(PROMPT) - 1 :], abs=1e-3)
    for token, logprob in zip(tokens, logprobs, strict=True):
        assert logprob.top[0] == (token, logprob.logprob) and len(logprob.top) == 3
        assert sorted(logprob.top, key=lambda pair: -pair[1]) == list(logprob.top)


def test_log_probabilities_are_of_the_model(client) -> None:
    """Temperature, bias and masks have no influence on them."""
    plain = client.events(client.submit(max_tokens=1, logprobs=1))[0].logprobs[0].top
    changed = {"logit_bias": {5: 90.0}, "temperature": 0.1}
    assert client.events(client.submit(max_tokens=1, logprobs=1, **changed))[0].logprobs[0].top == (
        plain
    )
    alone = client.events(client.submit([7], max_tokens=1, prompt_logprobs=2))
    assert alone[0].prompt_logprobs == (None,)


def test_a_guided_request_waits_and_others_go_on(client) -> None:
    expected = client.generate(**SAMPLED)
    guided = client.submit(guided=True, max_tokens=3)
    client.engine.allow(guided, mask(77))
    assert tokens_of(client.events(guided, 1)) == [77]
    assert client.generate(**SAMPLED) == expected
    assert client.engine.status().running == 1
    client.engine.allow(guided, mask(5, 6))
    assert tokens_of(client.events(guided, 2))[1] in (5, 6)
    client.engine.cancel(guided)
    assert client.events(guided)[-1].finish_reason == "cancelled"
    client.engine.allow(guided, ALL)  # it has ended, and this is no error


def test_masks_that_do_not_fit(client) -> None:
    guided = client.submit(guided=True)
    with pytest.raises(ValueError, match="the mask has 3 bytes, expected 33"):
        client.engine.allow(guided, b"abc")
    client.engine.allow(guided, mask())
    last = client.events(guided)[-1]
    assert last.finish_reason == "error" and "allows no token" in last.error
    waiting = [client.submit(guided=True) for _ in range(2)]
    unguided = client.submit(max_tokens=25)  # it cannot begin, and so not end, before the others
    with pytest.raises(ValueError, match="is not guided"):
        client.engine.allow(unguided, ALL)
    for request in waiting:
        client.engine.cancel(request)
    client.events(unguided)
    assert client.engine.status().broken is None and client.generate()


def test_the_queue_is_bounded_and_in_order(client) -> None:
    running = [client.submit(guided=True) for _ in range(2)]
    # First the two that are served must leave the queue.
    while client.engine.status().running < 2:
        pass
    waiting = [client.submit(max_tokens=1) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        client.submit()
    assert client.engine.status().waiting == 3
    client.engine.cancel(waiting[1])
    assert [e.finish_reason for e in client.events(waiting[1])] == ["cancelled"]
    waiting[1] = client.submit(max_tokens=1)
    client.engine.cancel(running[0])
    # There is one place, so they are served one after the other.
    order = []
    while len(order) < 3:
        select.select([client.engine.fileno()], [], [], 60)
        for event in client.engine.take_events():
            client._events.setdefault(event.request_id, []).append(event)
            if event.request_id in waiting:
                order.append(event.request_id)
    assert order == [waiting[0], waiting[2], waiting[1]]
    client.engine.cancel(running[1])
    client.events(running[1])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 33, {}, "the prompt has 33 tokens, the context of the program holds 32"),
        ([1] * 33, {"max_tokens": 0}, "the prompt has 33 tokens, the context"),
        ([1] * 32, {"max_tokens": None}, "has 32 tokens, .* of which the answer needs one"),
        ([1] * 32, {}, "has 32 tokens, .* holds 32, of which the answer needs one at least"),
        ([1], {"max_tokens": "many"}, "max_tokens 'many': expected an integer"),
        ([1, 264], {}, "the prompt: token id 264 is outside the vocabulary of 264"),
        ([-1], {}, "the prompt: token id -1 is outside"),
        (["a"], {}, r"prompt_ids \['a'\]: expected token ids"),
        (["é" * 5000], {}, "prompt_ids \\['é{19}\\.\\.\\.: expected token ids$"),
        ([1], {"temperature": -1.0}, "temperature -1: expected"),
        ([1], {"temperature": "hot"}, "temperature 'hot': expected a number"),
        ([1], {"top_k": -1}, "top_k -1"),
        ([1], {"top_p": 0.0}, "top_p 0"),
        ([1], {"top_p": 1.0000001}, "top_p 1.0000001: expected more than 0 and at most 1"),
        ([1], {"min_p": 1.5}, "min_p 1.5: expected 0 to 1"),
        ([1], {"seed": 2**63}, "seed 9223372036854775808: expected an integer of 64 bits"),
        ([1], {"max_tokens": -1}, "max_tokens -1"),
        ([1], {"presence_penalty": float("nan")}, "presence_penalty nan"),
        ([1], {"frequency_penalty": float("inf")}, "frequency_penalty inf"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty 0"),
        ([1], {"logit_bias": {264: 1.0}}, "logit_bias: token id 264"),
        ([1], {"logit_bias": {1: float("nan")}}, "logit_bias nan"),
        ([1], {"stop_token_ids": (-2,)}, "stop_token_ids: token id -2"),
        ([1], {"logprobs": 265}, "logprobs 265: expected 0 to 264"),
        ([1], {"prompt_logprobs": -1}, "prompt_logprobs -1"),
        ([1], {"guided": 1}, "guided 1: expected True or False"),
    ],
)
def test_bad_requests_are_refused_by_name(client, prompt, params, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client.submit(prompt, **params)


def test_files_that_cannot_be_loaded(tmp_path, tiny_program) -> None:
    with pytest.raises(RuntimeError, match=r"model\.pte"):
        load_engine(tmp_path)
    with pytest.raises(ValueError, match="max_sequences 0"):
        load_engine(tiny_program, max_sequences=0)


def test_a_closed_engine(tiny_program) -> None:
    engine = load_engine(tiny_program, max_sequences=1)
    client = Client(engine)
    held, waiting = client.submit(guided=True), client.submit()
    engine.close()
    engine.close()
    for request_id in (held, waiting):
        assert client.events(request_id)[-1].finish_reason == "cancelled"
    with pytest.raises(EngineBrokenError, match="the engine is closed"):
        client.submit()
    engine.cancel(held)


def test_streams(tiny_program) -> None:
    async def one(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> list[int]:
        events = [event async for event in engine.stream(prompt, params)]
        assert events[-1].finish_reason == "length"
        return tokens_of(events)

    async def run() -> None:
        engine = AsyncEngine(load_engine(tiny_program, max_sequences=3))
        params = SamplingParams(max_tokens=6, ignore_eos=True, **SAMPLED)
        prompts = [[n, n + 1, 2 * n] for n in range(12)]
        alone = [await one(engine, prompt, params) for prompt in prompts]
        assert await asyncio.gather(*(one(engine, p, params) for p in prompts)) == alone
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["aclose", "task", "with"])
def test_a_consumer_that_goes_away_cancels_its_request(tiny_program, how: str) -> None:
    async def idle(engine) -> None:
        while engine.engine.status().running:
            await asyncio.sleep(0.01)

    async def run() -> None:
        engine = AsyncEngine(load_engine(tiny_program))
        params = SamplingParams(guided=True)
        if how == "with":
            with engine.submit(PROMPT, params) as stream:
                engine.engine.allow(stream.request_id, ALL)
                assert len((await anext(stream)).token_ids) == 1
        else:
            stream = engine.stream(PROMPT, params)
            task = asyncio.ensure_future(anext(stream))
            while not engine.engine.status().running:
                await asyncio.sleep(0.01)
            if how == "aclose":
                engine.engine.allow(1, ALL)
                await task
                await stream.aclose()
            else:
                task.cancel()
        await asyncio.wait_for(idle(engine), 60)
        assert not engine._streams
        await engine.close()

    asyncio.run(run())


def test_closing_ends_streams(tiny_program) -> None:
    async def run() -> None:
        engine = AsyncEngine(load_engine(tiny_program))
        with engine.submit(PROMPT, SamplingParams(guided=True)) as stream:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            await engine.close()
            assert (await task).finish_reason == "cancelled"

    asyncio.run(run())
