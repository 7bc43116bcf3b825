"""`et-moe serve` with a real program."""

import asyncio
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from server_process import Server

from et_moe.serving.engine import load_engine


@pytest.fixture(scope="module")
def server(tiny_program: Path):
    options = ("--port", "0", "--max-sequences", "4", "--model-name", "tiny")
    running = Server("et-moe", "serve", tiny_program, *options)
    yield running
    running.stop()


def test_twelve_at_once_get_the_texts_that_they_get_alone(server) -> None:
    """Tokens are drawn with a seed, so that each depends on those before it."""
    requests = [
        {"prompt": [3 + i, 60, 7], "max_tokens": 10 + i, "seed": i, "temperature": 1.0}
        for i in range(12)
    ]

    async def ask(client: httpx.AsyncClient, body: dict) -> str:
        body = {**body, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            alone = [await ask(client, body) for body in requests]
            together = await asyncio.gather(*(ask(client, body) for body in requests))
            assert alone == together and len(set(alone)) > 6

    asyncio.run(run())


def test_what_there_is_room_for_is_logged(server, tiny_program: Path) -> None:
    """In the runner's words."""
    asked = server.wait_for_line(r"capacity: (.+)")
    engine = load_engine(tiny_program, max_sequences=4)
    pages = engine.status().pages
    engine.close()
    assert asked == f"4 sequences at once, a KV cache of {64 * pages} tokens"


def test_what_the_program_refuses(server) -> None:
    """Bad prompts are refused with the engine's own words, and chats for lack of a template."""
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    for body in ({"prompt": [1] * model["max_model_len"]}, {"prompt": [10**6]}):
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
    response = server.chat("Hi")
    assert response.status_code == 400 and "no chat template" in response.text


def test_prompt_and_answer_have_the_context_together(server) -> None:
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    for count in (model["max_model_len"] - 1, model["max_model_len"] - 3):
        for fields in ({"max_tokens": 100}, {"max_tokens": None}):
            body = {"prompt": [1] * count, "ignore_eos": True, **fields}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            assert answer["usage"]["total_tokens"] == model["max_model_len"]
            assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_fills_the_context_is_scored(server) -> None:
    """Without an answer it needs no room for one."""
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    most = model["max_model_len"]
    body = {"prompt": [1] * most, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert (answer["usage"]["total_tokens"], answer["usage"]["completion_tokens"]) == (most, 0)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == most
    refused = httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": [1] * (most + 1)})
    assert refused.status_code == 400


def test_a_port_in_use_is_found_before_the_model_is_loaded(server, tmp_path) -> None:
    """The folder holds no model."""
    command = ["et-moe", "serve", tmp_path, "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"error: --host 127.0.0.1 --port {server.port}: Address already in use\n"


def test_it_ends_in_order(server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert "error" not in server.log.lower(), server.log


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["nowhere"], "error: nowhere: no such folder, expected one that"),
        (["--port", "99999", "nowhere"], "--port"),
        (["--api-key", " ", "nowhere"], "--api-key: expected a key"),
        ([""], "expected a folder, got an empty text"),
    ],
)
def test_bad_arguments(tmp_path, arguments: list[str], fault: str) -> None:
    done = subprocess.run(
        ["et-moe", "serve", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and fault in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
