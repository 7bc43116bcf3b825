"""Replicas of the server on Ray Serve: `serve run et_moe.serving.ray:application program=FOLDER`.

A `Replica` hosts the application of `server.py` over an engine of its own. In front of them stands
`Front`, which hands requests on by consistent hashing (Ray's router): those of one conversation go
to one replica, whose prefix cache has what was said, as long as it has a place for them.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from et_moe.serving.conversation_key import conversation_key
from et_moe.serving.http_limits import HttpLimits
from et_moe.serving.openai.errors import APIError
from et_moe.serving.openai.events import DONE, event
from et_moe.serving.page import PAGE_PATHS
from et_moe.serving.ray_metrics import export
from et_moe.serving.served_model import model_opener
from et_moe.serving.server import create_app

logger = logging.getLogger("et_moe.serving")

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ATTEMPTS = 3
"""How often a request is begun whose replica was lost before it said anything."""


class Arguments(BaseModel):
    """What `serve run` and a Serve configuration may say, with the meaning that the options of
    `et-moe serve` have."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    program: Path
    model_name: str | None = None
    api_key: str | None = Field(default_factory=lambda: os.environ.get("ET_MOE_API_KEY"))
    max_sequences: int = Field(8, ge=1)
    max_waiting: int = Field(256, ge=1)
    memory_fraction: float | None = Field(None, gt=0, le=1)
    drain_seconds: float = Field(25.0, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    num_gpus: float = Field(1, ge=0)

    @field_validator("api_key")
    @classmethod
    def _is_a_key(cls, key: str | None) -> str | None:
        if key is not None and not key.strip():
            raise ValueError("expected a key, got an empty text")
        return key


class Replica:
    """One engine, on a GPU of its own, and the application over it."""

    async def __init__(self, arguments: Arguments) -> None:
        open_model = await asyncio.to_thread(
            model_opener,
            arguments.program,
            arguments.model_name,
            max_sequences=arguments.max_sequences,
            max_waiting=arguments.max_waiting,
            memory_fraction=arguments.memory_fraction,
        )
        self._app = create_app(open_model)
        self._running = self._app.router.lifespan_context(self._app)
        await self._running.__aenter__()
        self._exported = asyncio.ensure_future(export(self._app.state.model.metrics))

    async def respond(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """What the application sends, those messages together that are there at once. A caller that
        leaves is a client that leaves."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> Message:
            if request:
                return request.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(scope, receive, sent.put))
        work.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            ended = False
            while not ended:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                ended = messages[-1] is None
                yield [message for message in messages if message is not None]
            await work
        finally:
            left.set()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def check_health(self) -> None:
        """Ray starts a replica anew whose device has failed."""
        broken = self._app.state.model.engine.engine.status().broken
        if broken is not None:
            raise RuntimeError(f"the device has failed: {broken}")

    async def __del__(self) -> None:
        self._exported.cancel()
        await self._running.__aexit__(None, None, None)


class Front:
    """ASGI application that hands requests on to replicas.

    Args:
        replicas: a handle of `Replica`.
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(method_name="respond", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        # Under a route prefix, which Ray leaves in the path.
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path == "/metrics":
            # Handed on, it would be of one replica by chance, and wait where that one is full.
            message = "every replica's metrics are at Ray's metrics port on its machine"
            return await APIError(404, message).response()(scope, receive, send)
        body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
        replicas = self._replicas.options(session_id=conversation_key(body))
        plain = {key: scope[key] for key in _SCOPE if key in scope}
        plain |= {"root_path": "", "path": path, "raw_path": path.encode()}
        for _ in range(ATTEMPTS):
            answer = _Answer(send)
            try:
                async for messages in replicas.remote(plain, body):
                    for message in messages:
                        await answer.send(message)
                return
            except BackPressureError:
                error = APIError(429, "the queue is full: try again later", code="queue_full")
                return await error.response()(scope, receive, send)
            except (RayActorError, ReplicaUnavailableError) as error:
                logger.warning("a replica was lost: %s", type(error).__name__)
                if answer.begun:
                    return await answer.fail(scope["path"])
        error = APIError(503, "replicas were lost: try again", code="replica_lost")
        await error.response()(scope, receive, send)


_SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("headers", "client", "server"),
)
"""What a replica is told of a request; the rest cannot leave the process."""


class _Answer:
    """One answer on its way to a client."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun, self._streams = send, False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            types = [value for name, value in message["headers"] if name == b"content-type"]
            self._streams = any(value.startswith(b"text/event-stream") for value in types)
        self.begun = True
        await self._send(message)

    async def fail(self, path: str) -> None:
        """Ends a stream with an event that says so. What is no stream cannot be ended well: the
        client sees that its body is too short."""
        if not self._streams:
            raise ConnectionError("the replica was lost in the middle of its answer")
        error = APIError(503, "the replica of this request was lost", code="replica_lost")
        name = "error" if path.endswith("/responses") else None
        end = event(error.envelope(), name) + (b"" if name else DONE)
        await self._send({"type": "http.response.body", "body": end, "more_body": False})


def application(arguments: Arguments) -> serve.Application:
    """The application for Ray Serve, of what `serve run` gives as KEY=VALUE.

    A replica takes as many requests at once as it decodes together. When it has them, a request
    goes to the next replica on the ring, and waits where all are full; replicas are added, up to
    `max_replicas`, when those that run and wait are more than the replicas have places for.
    """
    replica = serve.deployment(
        name="Replica",
        ray_actor_options={"num_gpus": arguments.num_gpus, "num_cpus": 1},
        max_ongoing_requests=arguments.max_sequences,
        max_queued_requests=arguments.max_waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.max_sequences,
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        graceful_shutdown_timeout_s=arguments.drain_seconds,
    )(Replica).bind(arguments)
    api_key = arguments.api_key

    def front() -> Starlette:
        name = serve.get_replica_context().app_name
        limits = Middleware(
            HttpLimits,
            api_key=api_key,
            open_paths=frozenset({"/health", *PAGE_PATHS}),
            refused=lambda status: None,
        )
        mounted = Mount("/", Front(serve.get_deployment_handle("Replica", name)))
        return Starlette(routes=[mounted], middleware=[limits])

    deployment = serve.deployment(
        name="Front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100_000
    )(serve.ingress(front)())
    return deployment.bind(replica)
