"""Two replicas on Ray Serve, and one that is killed while they are under load.

Ray is in none of the extras that the other tests take: `pip install '.[ray]'`, and then
`python -m pytest -n 0 tests/serving/test_ray.py`, which takes three minutes.
"""

import asyncio
import json
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray")

REPLICAS, TOKENS = 2, 600
REPORT_SECONDS = 4
"""How often Ray collects metrics; 10 where nobody says so."""


@pytest.fixture(scope="module")
def url(demo_program: Path):
    """Of the application, with a key."""
    import ray
    from ray import serve

    from et_moe.serving.ray import Arguments, application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=REPLICAS,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _system_config={"metrics_report_interval_ms": REPORT_SECONDS * 1000},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(
        program=demo_program,
        model_name="demo",
        api_key="secret",
        num_gpus=0,
        min_replicas=1,
        max_replicas=REPLICAS,
    )
    serve.run(application(arguments), name="moe")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas() -> list[psutil.Process]:
    """Their processes, of this test's Ray alone."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any("ServeReplica:moe:Replica" in part for part in process.cmdline())
    ]


def running() -> int:
    """How many replicas answer."""
    from ray import serve

    states = serve.status().applications["moe"].deployments["Replica"].replica_states
    return states.get("RUNNING", 0)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not happen within a minute")


def measured(name: str) -> dict[str, float]:
    """What each replica has of a metric without further labels, as Ray gives it to Prometheus."""
    import ray

    text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics").text
    return {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"ray_et_moe_{name}"
    }


def client(url: str, **options) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, timeout=120, headers={"Authorization": "Bearer secret"}, **options
    )


def body(number: int, **fields) -> dict:
    """A request whose answer is the same wherever it is computed."""
    question = {"role": "user", "content": f"What does function {number} return?"}
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
    return {"messages": [question]} | greedy | fields


def text_of(message: dict) -> str:
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


async def answer(session: httpx.AsyncClient, number: int) -> str:
    response = await session.post("/v1/chat/completions", json=body(number))
    assert response.status_code == 200, response.text
    return text_of(response.json()["choices"][0]["message"])


async def streamed(
    session: httpx.AsyncClient, number: int, begun: asyncio.Semaphore
) -> tuple[str, dict | None]:
    """The text that came, and the error that the stream ended with. `begun` is released once it has
    begun."""
    text, error, lines = "", None, []
    request = session.stream("POST", "/v1/chat/completions", json=body(number, stream=True))
    async with request as response:
        assert response.status_code == 200, await response.aread()
        begun.release()
        async for line in response.aiter_lines():
            lines += [line[6:]] if line.startswith("data: ") else []
    assert lines.pop() == "[DONE]"
    for event in map(json.loads, lines):
        error = error or event.get("error")
        for choice in event.get("choices", ()):
            text += text_of(choice["delta"])
    return text, error


def test_refusals_come_from_the_front(url: str) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 415)):
        response = httpx.post(f"{url}/v1/chat/completions", content=b"{}", headers=headers)
        assert response.status_code == status and "error" in response.json()
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/").status_code == 200


def test_replicas_are_added_while_more_wait_than_one_has_places_for(url: str) -> None:
    """All tests below have them all: Ray takes none away for ten minutes."""
    assert running() == 1

    async def ask(session: httpx.AsyncClient, number: int) -> None:
        while await asyncio.to_thread(running) < REPLICAS:
            await answer(session, number)

    async def run() -> None:
        async with client(url) as session, asyncio.timeout(200):
            await asyncio.gather(*(ask(session, number) for number in range(24)))

    asyncio.run(run())


def test_a_conversation_finds_its_prefix(url: str) -> None:
    """Of 16 conversations all would find it by chance once in 65,536 times. So few are held at once
    that no replica is full."""

    async def converse(session: httpx.AsyncClient, number: int, places: asyncio.Semaphore) -> None:
        question = {"role": "user", "content": f"Of {number}: " + "def f(x): return x\n" * 170}
        request = body(number, max_tokens=8, messages=[question])
        async with places:
            first = (await session.post("/v1/chat/completions", json=request)).json()
            said = first["choices"][0]["message"]
            request["messages"] += [said, {"role": "user", "content": "And then?"}]
            second = (await session.post("/v1/chat/completions", json=request)).json()
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 1024, second

    async def run() -> None:
        places = asyncio.Semaphore(4)
        async with client(url) as session:
            await asyncio.gather(*(converse(session, number, places) for number in range(16)))

    asyncio.run(run())


def test_every_replica_is_measured(url: str) -> None:
    """Also while requests wait. What all have counted is what was asked."""
    refused = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer secret"})
    assert refused.status_code == 404 and "Ray's metrics port" in refused.text
    generated, firsts = "generated_tokens_total", "time_to_first_token_seconds_count"
    wait_for(lambda: len(measured(generated)) == REPLICAS)
    time.sleep(REPORT_SECONDS * 2.5)  # what was asked before has been reported
    before, before_firsts = measured(generated), measured(firsts)
    assert set(measured("engine_up").values()) == {1}
    answers = 0

    async def ask(session: httpx.AsyncClient, number: int, both: asyncio.Future) -> None:
        nonlocal answers
        while not both.done():
            await answer(session, number)
            answers += 1

    async def run() -> None:
        async with client(url) as session:
            work = asyncio.to_thread(
                wait_for, lambda: min(measured("requests_running").values()) > 0
            )
            both = asyncio.ensure_future(work)
            await asyncio.gather(both, *(ask(session, number, both) for number in range(24)))

    asyncio.run(run())
    expected = sum(before.values()) + answers * TOKENS
    wait_for(lambda: sum(measured(generated).values()) == expected)
    assert measured(generated).keys() == before.keys()
    assert sum(measured(firsts).values()) == sum(before_firsts.values()) + answers


def test_a_client_that_leaves_frees_its_place(url: str) -> None:
    """More than there are places for begin long answers and leave; the next is served at once."""

    async def leave(session: httpx.AsyncClient, number: int) -> None:
        long = body(number, stream=True, max_tokens=1900)
        async with session.stream("POST", "/v1/chat/completions", json=long) as response:
            await anext(response.aiter_lines())

    async def run() -> None:
        async with client(url) as session:
            await asyncio.gather(*(leave(session, number) for number in range(32)))
            begin = time.monotonic()
            await answer(session, 0)
            assert time.monotonic() - begin < 20

    asyncio.run(run())


def test_a_replica_is_killed_under_load(url: str) -> None:
    """No request that had not begun is lost, streams that had begun end with an error, and the
    replica comes again, as another one for who measures it."""
    numbers, victim, measured_before = range(24), replicas()[0], measured("engine_up").keys()

    async def run() -> int:
        async with client(url, limits=httpx.Limits(max_connections=None)) as session:
            alone = [await answer(session, number) for number in numbers]
            begun = asyncio.Semaphore(0)
            streams = [asyncio.ensure_future(streamed(session, n, begun)) for n in numbers]
            whole = [asyncio.ensure_future(answer(session, number)) for number in numbers]
            for _ in range(8):
                await begun.acquire()
            victim.send_signal(signal.SIGKILL)
            assert await asyncio.gather(*whole) == alone
            broken = 0
            for (text, error), expected in zip(await asyncio.gather(*streams), alone, strict=True):
                assert text == expected if error is None else expected.startswith(text)
                assert error is None or error["code"] == "replica_lost"
                broken += error is not None
            assert [await answer(session, number) for number in numbers] == alone
            return broken

    broken = asyncio.run(run())
    print(f"{broken} streams ended with an error", file=sys.stderr)
    assert 0 < broken < len(numbers)
    wait_for(lambda: victim not in replicas() and running() == REPLICAS)
    wait_for(lambda: len(measured("engine_up").keys() & measured_before) == REPLICAS - 1)
    wait_for(lambda: len(measured("engine_up")) == REPLICAS)
