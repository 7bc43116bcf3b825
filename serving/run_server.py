"""The server's process: listens, drains when it is told to end, and ends by itself when the device
has failed."""

import asyncio
import copy
import logging
import resource
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

logger = logging.getLogger("et_moe.serving")

_FAILED = 1
"""Exit code once the device has failed, so that a supervisor starts the process anew."""


class _Server(uvicorn.Server):
    """uvicorn's, whose end begins with a time in which what runs may finish. It listens meanwhile,
    so that whoever asks `/health` is told, and new requests are refused with a status."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app, self._drain_seconds = app, drain_seconds
        self._deadline: float | None = None  # of the drain, by time.monotonic
        self.failed = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again after the end; a process that was asked to end and
        did so in order has exit code 0. A second Ctrl-C does not wait."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = self._app.state.draining = True

    async def on_tick(self, counter: int) -> bool:
        ending = await super().on_tick(counter)
        status = self._status()
        if status.broken is not None and not self.failed:
            logger.error("the device has failed: %s", status.broken)
            self.failed = True
        if self.failed or self.force_exit or not ending:
            return ending or self.failed
        return self._seconds_left() == 0 or not self._requests()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            engine = self._app.state.model.engine.engine
            logger.info("capacity: %s", engine.status().capacity(engine.info))

    def _status(self):
        return self._app.state.model.engine.engine.status()

    def _requests(self) -> int:
        """How many are being answered. The engine does not know all of them: a prompt is tokenized
        and a grammar compiled before it does."""
        return len(self.server_state.tasks)

    def _seconds_left(self) -> float:
        """Of the drain, which the first call begins."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._drain_seconds
            if requests := self._requests():
                logger.info("%d requests have %.0f seconds to end", requests, self._drain_seconds)
        return max(0.0, self._deadline - now)

    async def shutdown(self, sockets=None) -> None:
        self._app.state.draining = True
        seconds = self._seconds_left()
        self.config.timeout_graceful_shutdown = int(seconds) + 5
        limit = asyncio.get_running_loop().call_later(seconds, self._end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()

    def _end_requests(self) -> None:
        """Streams end with an event that says so, other requests with status 503."""
        self._app.state.model.cancel_all()


def check_address(host: str, port: int) -> None:
    """Raises ValueError where nothing can listen at an address, which is said before a model is
    loaded for minutes."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                probe = socket.socket(family, kind, protocol)
            except OSError:
                continue  # the server, too, leaves out a family that the machine lacks
            with probe:  # with the options of the server's own
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from None


def serve(app: FastAPI, host: str, port: int, drain_seconds: float = 25.0) -> None:
    """Serves until SIGTERM or SIGINT, and returns. Exits with code 1 if the device fails or
    the address is taken.

    Args:
        drain_seconds: requests that run when a signal comes have so long to end.
    """
    _raise_file_limit()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=_log_config(),
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_keep_alive=60,
        lifespan="on",
    )
    server = _Server(config, app, drain_seconds)
    server.run()
    if server.failed or not server.started:
        sys.exit(_FAILED)


def _log_config() -> dict:
    """uvicorn's, for what this package logs, too."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"][logger.name] = config["loggers"]["uvicorn"]
    return config


def _raise_file_limit() -> None:
    """Each connection takes a file descriptor, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
