"""What `et-moe serve` costs: the same requests through the runner and over HTTP, in one run.

Prompts are random token ids, sent to `/v1/completions` all at once, each over a connection of its
own, and streamed. The clients are in this process and read no more of an event than they need, so
that they do not take the server's time. As of the runner, the second of two runs counts.
"""

import asyncio
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from et_moe.benchmarks.batch import Load, run_load
from et_moe.benchmarks.e2e import measure_gpu
from et_moe.benchmarks.report.overhead import COLUMNS, cells
from et_moe.benchmarks.result import provenance, write_result
from et_moe.benchmarks.server import served
from et_moe.examples.qwen3_5_moe.config import ModelConfig

_DATA = b"data: "
_COMPARED = ("output_token_per_sec", "decode_token_per_sec", "time_to_first_token_ms_median")
"""In the names of the runner's stats; the rate of decode where there is one request."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """When a stream's first and last event came, in seconds since all began, and its tokens."""

    first: float
    last: float
    tokens: int


def _tokenizer(vocabulary: int) -> Tokenizer:
    """One in which every id has a text: what is drawn from random weights must not be silent."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġ{number}" for number in range(len(alphabet), vocabulary))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words[:vocabulary])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@contextlib.contextmanager
def _whole(program: Path, vocabulary: int) -> Iterator[Path]:
    """The program's folder, or one with a tokenizer besides, which programs of random weights may
    lack."""
    if (program / "tokenizer.json").exists():
        yield program
        return
    with tempfile.TemporaryDirectory() as name:
        for path in program.iterdir():
            (Path(name) / path.name).symlink_to(path.resolve())
        _tokenizer(vocabulary).save(str(Path(name) / "tokenizer.json"))
        yield Path(name)


async def _stream(port: int, body: bytes, begin: float) -> Stream:
    """Sends a request and reads its events.

    Raises:
        RuntimeError: another status than 200, or a stream that says what failed.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError((status + await reader.read()).decode(errors="replace")[-500:])
    first = last = 0.0
    event = _DATA + b"{}"
    async for line in reader:
        if line.startswith(_DATA + b"{"):
            last = time.monotonic() - begin
            first = first or last
            event = line
    writer.close()
    usage = json.loads(event[len(_DATA) :]).get("usage")
    if usage is None:
        raise RuntimeError(f"a stream ended with {event.decode(errors='replace')[:500]}")
    return Stream(first, last, usage["completion_tokens"])


async def _run(port: int, bodies: list[bytes]) -> list[Stream]:
    begin = time.monotonic()
    return await asyncio.gather(*(_stream(port, body, begin) for body in bodies))


def _bodies(load: Load, vocabulary: int) -> list[bytes]:
    requests = (
        {
            "prompt": line["prompt_ids"],
            "max_tokens": line.get("max_new_tokens", load.new_tokens),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for line in load.lines(vocabulary)
    )
    return [json.dumps(request).encode() for request in requests]


def _serve(program: Path, load: Load, vocabulary: int) -> dict:
    """What the clients of a server see, in the names of the runner's stats."""
    bodies = _bodies(load, vocabulary)
    flags = ("--max-sequences", str(load.sequences), "--max-waiting", str(load.requests))
    with served(program, *flags, "--no-prefix-cache") as (process, port):
        asyncio.run(_run(port, bodies))
        times = psutil.Process(process.pid).cpu_times
        before = times()
        streams = asyncio.run(_run(port, bodies))
        after = times()
    used = (after.user - before.user) + (after.system - before.system)
    tokens = sum(stream.tokens for stream in streams)
    found = {
        "generated_tokens": tokens,
        "output_token_per_sec": tokens / max(s.last for s in streams),
        "time_to_first_token_ms_median": 1e3 * statistics.median(s.first for s in streams),
        "cpu_us_per_token": 1e6 * used / tokens,
    }
    if len(streams) == 1 and streams[0].last > streams[0].first:  # one event may have all tokens
        found["decode_token_per_sec"] = (tokens - 1) / (streams[0].last - streams[0].first)
    return found


def _compare(runner: Path, program: Path, load: Load, vocabulary: int) -> dict:
    """A row of the result.

    Raises:
        RuntimeError: the runner or a request fails.
        ValueError: the server does not start.
    """
    stats = run_load(runner, program, load, vocabulary)
    alone = {name: stats[name] for name in ("generated_tokens", *_COMPARED)}
    if load.requests > 1:  # of some, others' prompts are in between
        del alone["decode_token_per_sec"]
    with _whole(program, vocabulary) as folder:
        return {"runner": alone, "server": _serve(folder, load, vocabulary)}


def measure(runner: Path, program: Path, loads: list[Load], c: ModelConfig, out: Path) -> bool:
    """Measures each load by the runner and by the server, and writes `out` after each.

    Returns:
        Whether no measurement failed.
    """
    result: dict = provenance() | {"gpu": measure_gpu(), "rows": []}
    table = Table(*COLUMNS)
    for load in loads:
        row: dict = dataclasses.asdict(load)
        try:
            row |= _compare(runner, program, load, c.vocab_size)
        except (RuntimeError, ValueError) as error:  # one failure must not end the benchmark
            row["error"] = str(error)
        result["rows"].append(row)
        for line in cells(row):
            table.add_row(*line)
        print(row, flush=True)
        write_result(out, result)
    Console(width=150).print(table)
    return not any("error" in row for row in result["rows"])
