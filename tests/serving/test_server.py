"""The server as a process: clients that leave, load, slow clients, signals, a broken device."""

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from server_process import FAKE_SERVER, Server, fake_server


@pytest.fixture(scope="module")
def server():
    running = fake_server(0.005, 5)
    yield running
    running.stop()


@pytest.fixture
def own_server():
    """Makes servers that end with the test."""
    made = []

    def make(seconds: float, drain: float) -> Server:
        made.append(fake_server(seconds, drain))
        return made[-1]

    yield make
    for running in made:
        running.stop()


def assert_conforms(url: str) -> None:
    """All tests of ExecuTorch's suite for such servers run and pass; they would all be skipped if
    no server were found."""
    package = Path(importlib.util.find_spec("executorch").submodule_search_locations[0])
    suite = package / "examples/llm_server/conformance/test_openai_contract.py"
    environment = os.environ | {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_MODEL": "demo"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", suite.parent, "-c", os.devnull, suite]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_the_openai_package(server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["demo"]
    messages = [{"role": "user", "content": "say 3"}]
    answer = client.chat.completions.create(model="demo", messages=messages)
    assert answer.choices[0].message.content == "word word word"
    stream = client.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "word word word" and chunks[-1].usage.total_tokens > 3
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="demo", messages=[])
    completion = client.completions.create(model="demo", prompt="say 2")
    assert completion.choices[0].text == "</think>\n\n word word"
    response = client.responses.create(model="demo", input="say 3")
    assert response.output_text == "word word word" and response.usage.output_tokens > 3
    events = list(client.responses.create(model="demo", input="say 3", stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == "word word word" and events[-1].response.output_text == text


def test_a_client_that_leaves_a_response_frees_its_place(server) -> None:
    with server.stream("", "/v1/responses", input="say 5000") as response:
        lines = response.iter_lines()
        assert next(lines) == "event: response.created"
        server.wait_for("et_moe_requests_running", 1)
    server.wait_for("et_moe_requests_running", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "say 5000"}], "stream": stream, "n": 2}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        server.wait_for("et_moe_requests_running", 2)
    server.wait_for("et_moe_requests_running", 0)


def test_a_full_queue(own_server) -> None:
    """Two requests run and two wait. The next is told to come again, and no other is disturbed."""
    server = own_server(0.008, 60.0)  # an answer takes 2 seconds
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.chat("say 250"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    server.wait_for("et_moe_requests_waiting", 2)
    refused = server.chat("say 1")
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert texts == {"word" + " word" * 249}
    assert server.metric('et_moe_requests_rejected_total{status="429"}') >= 1


def test_an_engine_that_fails_at_a_request(server) -> None:
    """If it fails before the first token, the answer has an error status, streamed or not."""
    assert server.chat("fail").status_code == 503
    assert server.chat("fail", stream=True).json()["error"]["code"] == "generation_failed"
    assert server.chat("say 1").status_code == 200


def test_slow_and_broken_clients(server) -> None:
    """A thousand connections that say nothing or half a request, and one that does not read."""
    heads = [
        b"",
        b"GET /he",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{",
        b"\0",
    ]
    connections = []
    for i in range(1000):
        connections.append(socket.create_connection(("127.0.0.1", server.port)))
        connections[-1].sendall(heads[i % 4])
    assert httpx.get(f"{server.url}/health", timeout=10).json() == {"status": "ok"}
    asked = httpx.head(f"{server.url}/health", timeout=10)
    assert asked.status_code == 200 and not asked.content
    with server.stream("say 50") as response:
        assert response.status_code == 200  # and nothing is read
    for connection in connections:
        connection.close()
    server.wait_for("et_moe_requests_running", 0)
    assert server.chat("say 2").status_code == 200


@pytest.mark.parametrize(("status", "kind"), [(413, "application/json"), (415, "text/plain")])
def test_a_client_that_sends_all_before_it_reads(server, status: int, kind: str) -> None:
    """It is told why it is refused, and so is one that asks before it sends."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {9 << 20}\r\n"
    for more, body in (("", b"x" * (9 << 20)), ("Expect: 100-continue\r\n", b"")):
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(f"{head}{more}\r\n".encode() + body)
            assert connection.recv(12) == f"HTTP/1.1 {status}".encode()


def test_what_is_refused_is_not_read_forever(server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        begin = time.monotonic()
        connection.sendall(head + b"Content-Length: 9\r\n\r\nx")
        assert connection.recv(12) == b"HTTP/1.1 415" and time.monotonic() - begin < 10


def test_many_clients_at_once_get_their_own_answers(server) -> None:
    async def one(client: httpx.AsyncClient, count: int) -> None:
        body = {"messages": [{"role": "user", "content": f"say {count}"}]}
        for _ in range(1000):
            response = await client.post("/v1/chat/completions", json=body)
            if response.status_code == 200:
                break
            assert response.status_code == 429
            await asyncio.sleep(0.05)
        text = response.json()["choices"][0]["message"]["content"]
        assert text == " ".join(["word"] * count)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            await asyncio.gather(*(one(client, count) for count in range(1, 13)))

    asyncio.run(run())


def test_the_conformance_suite_of_executorch(server) -> None:
    assert_conforms(server.url)


def test_sigterm_lets_requests_end(own_server) -> None:
    server = own_server(0.01, 100)
    with server.stream("say 200") as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"stop"' in rest[-4]
    assert server.ended() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_while_requests_end_new_ones_are_told(own_server) -> None:
    """A load balancer asks `/health` over new connections, and has to get an answer."""
    server = own_server(0.01, 100)
    with server.stream("say 9000") as response, httpx.Client(base_url=server.url) as kept:
        lines = response.iter_lines()  # without a reader the connection is closed
        next(lines)
        assert kept.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        health, refused = server.wait_for_draining(), server.chat("say 1")
        assert kept.get("/health").status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert (health.status_code, health.json()) == (503, {"status": "shutting down"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert server.ended() == 0


def test_a_request_that_has_not_come_to_the_engine_is_waited_for(own_server) -> None:
    server, answers = own_server(0.01, 40), []
    asking = threading.Thread(target=lambda: answers.append(server.chat("slowly say 3")))
    asking.start()
    server.wait_for_line("(it waits with a prompt)")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for_line(r"(\d+) requests have 40 seconds to end") == "1"
    time.sleep(0.5)  # several looks at whether there is something to wait for
    assert server.wait_for_draining().json() == {"status": "shutting down"}
    server.process.send_signal(signal.SIGUSR1)
    asking.join()
    assert answers[0].json()["choices"][0]["message"]["content"] == "word word word"
    assert server.ended() == 0


def test_a_second_ctrl_c_does_not_wait(own_server) -> None:
    server = own_server(0.01, 60)
    with server.stream("say 5000") as response:
        lines = response.iter_lines()  # without a reader the connection is closed
        next(lines)
        server.process.send_signal(signal.SIGINT)
        server.wait_for_draining()  # two signals at once may become one
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)


def test_sigterm_has_a_limit(own_server) -> None:
    server = own_server(0.01, 0.5)
    begin = time.monotonic()
    with server.stream("say 5000") as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert "error" in json.loads(rest[-4][6:]), rest[-4:]
    assert server.ended() == 0
    assert time.monotonic() - begin < 20


def test_a_broken_device_ends_the_process(own_server) -> None:
    server = own_server(0.01, 5)
    with server.stream("say 5000") as response:
        lines = response.iter_lines()
        next(lines)
        broken = server.chat("break")
        rest = list(lines)
    assert broken.status_code == 503 and "error" in json.loads(rest[-4][6:])
    assert server.ended() == 1
    assert "it is on fire" in server.log
    assert "say 5000" not in server.log


def test_the_address_is_taken(server, own_server) -> None:
    code = (
        "import sys; sys.argv = ['x', '0', '1']; import fake_server;"
        "serve = fake_server.serve;"
        f"fake_server.serve = lambda app, host, port, drain: serve(app, host, {server.port}, 1);"
        "fake_server.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=FAKE_SERVER.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "address already in use" in done.stderr
