"""Clients of `et-moe serve` that come and go at random: each answer must be the one that the
question gets alone, no request may fail that should not, and the server's memory must not grow."""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from et_moe.benchmarks.server import served

QUESTIONS = 48
LEAVES, REFUSED = 0.2, 0.05
"""Of requests: those whose client leaves within `PATIENCE` seconds, and invalid ones."""
PATIENCE = 3.0
GROWTH, SLACK = 1.05, 8 << 20
"""The server's memory may be larger in the last quarter than in the second by this factor and these
bytes."""


@dataclass(frozen=True)
class Question:
    """A request whose answer is the same whenever it is asked."""

    path: str
    body: dict

    @classmethod
    def draw(cls, rng: random.Random) -> "Question":
        """One of the three endpoints', streamed or not, greedy, of a length of its own."""
        words = " ".join(rng.choices(("list", "of", "a", "function", "returns", "the"), k=12))
        count = rng.randint(4, 64)
        path, body = rng.choice(
            [
                ("chat/completions", {"messages": [{"role": "user", "content": words}]}),
                ("completions", {"prompt": words}),
                ("responses", {"input": words}),
            ]
        )
        limit = "max_output_tokens" if path == "responses" else "max_tokens"
        return cls(path, {**body, limit: count, "temperature": 0, "stream": rng.random() < 0.5})


def _said(payload: dict) -> str:
    """The text of an answer, or what an event of a stream adds to it."""
    if "error" in payload and payload["error"] is not None:
        raise RuntimeError(payload["error"]["message"])
    if "choices" in payload:
        texts = []
        for choice in payload["choices"]:
            part = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            texts += [part.get("reasoning_content") or "", part.get("content") or ""]
        return "".join(texts)
    if "output" in payload:
        return "".join(part["text"] for item in payload["output"] for part in item["content"])
    return payload["delta"] if payload["type"].endswith("text.delta") else ""


async def _payloads(response: httpx.Response) -> AsyncIterator[dict]:
    if not response.headers["content-type"].startswith("text/event-stream"):
        yield json.loads(await response.aread())
        return
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


@dataclass
class Load:
    """What became of the requests so far."""

    session: httpx.AsyncClient
    outcomes: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first event
    memory: list[int] = field(default_factory=list)  # bytes, every second
    files: list[int] = field(default_factory=list)

    async def ask(self, question: Question) -> str:
        """The answer. Raises RuntimeError for a failure."""
        begin, text, first = time.monotonic(), "", None
        request = self.session.stream("POST", f"/v1/{question.path}", json=question.body)
        async with request as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}: {await response.aread()}")
            async for payload in _payloads(response):
                first = first or time.monotonic() - begin
                text += _said(payload)
        if question.body["stream"]:
            self.first.append(first)
        return text

    async def refused(self) -> None:
        """A request that is not valid is told so."""
        response = await self.session.post("/v1/chat/completions", json={"messages": []})
        if response.status_code != 400:
            raise RuntimeError(f"an empty conversation got status {response.status_code}")

    async def client(
        self, rng: random.Random, answers: list[tuple[Question, str]], until: float
    ) -> None:
        """One client, which comes back until the time is over."""
        while time.monotonic() < until:
            await asyncio.sleep(rng.expovariate(1.0))
            (question, answer), fate = rng.choice(answers), rng.random()
            try:
                if fate < REFUSED:
                    await self.refused()
                    self.outcomes["refused as asked"] += 1
                elif fate < REFUSED + LEAVES:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(rng.uniform(0, PATIENCE)):
                            await self.ask(question)
                    self.outcomes["left"] += 1
                else:
                    right = await self.ask(question) == answer
                    self.outcomes["right" if right else "wrong"] += 1
            except (RuntimeError, httpx.HTTPError) as error:
                self.outcomes["failed"] += 1
                self.faults.append(f"{question.path}: {type(error).__name__}: {error}"[:300])

    async def watch(self, process: psutil.Process) -> None:
        while True:
            self.memory.append(process.memory_info().rss)
            self.files.append(process.num_fds())
            await asyncio.sleep(1)

    def is_well(self, left: float) -> bool:
        """Whether all is as it should be; prints what was seen.

        Args:
            left: sequences that the server still has.
        """
        quarter = max(1, len(self.memory) // 4)
        early = statistics.mean(self.memory[quarter : 2 * quarter] or self.memory)
        late = statistics.mean(self.memory[-quarter:])
        first = sorted(self.first) or [0.0]
        print(", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items())))
        print(
            f"first event after {statistics.median(first):.2f} s, "
            f"99th percentile {first[len(first) * 99 // 100]:.2f} s"
        )
        print(
            f"memory {early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} in the "
            f"last, at most {max(self.memory) / 2**20:.1f}"
        )
        print(f"at most {max(self.files)} open files; {left:.0f} sequences left")
        for fault in self.faults[:10]:
            print(fault)
        grows = late > early * GROWTH + SLACK
        return not (self.outcomes["wrong"] or self.faults or grows or left)


async def _run(url: str, pid: int, clients: int, seconds: float, seed: int) -> bool:
    """Whether all went well."""
    rng = random.Random(seed)
    questions = [Question.draw(rng) for _ in range(QUESTIONS)]
    own = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a request's connection
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=own) as session:
        load = Load(session)
        answers = [(question, await load.ask(question)) for question in questions]
        load.first.clear()
        watch = asyncio.ensure_future(load.watch(psutil.Process(pid)))
        until = time.monotonic() + seconds
        rngs = [random.Random(f"{seed} {number}") for number in range(clients)]
        await asyncio.gather(*(load.client(rng, answers, until) for rng in rngs))
        watch.cancel()
        await asyncio.sleep(0.5)  # for the last that left
        metrics = (await session.get("/metrics")).text.splitlines()
    states = ("et_moe_requests_waiting ", "et_moe_requests_running ")
    return load.is_well(sum(float(line.split()[1]) for line in metrics if line.startswith(states)))


def measure(program: Path, clients: int, seconds: float, seed: int) -> bool:
    """Serves a program to so many clients for so long, and prints what became of them.

    Returns:
        Whether every answer was right, nothing failed, memory did not grow, nothing was left
        running, and the server ended in order.
    """
    with served(program, "--max-waiting", str(clients)) as (process, port):
        url = f"http://127.0.0.1:{port}"
        is_well = asyncio.run(_run(url, process.pid, clients, seconds, seed))
    print(f"exit code {process.returncode}")
    return is_well and process.returncode == 0
