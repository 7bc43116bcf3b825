"""Threads for large files: pieces shared out, and groups written while the next ones are made."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")


@contextlib.contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """A thread per core, each of which runs torch's operators alone.

    Torch's own threads wait for each other after every operator, which costs more than it gains
    where an operator takes microseconds or other programs want the cores.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        with ThreadPoolExecutor(cores, "worker", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        # A worker's setting is its own, but also what threads begin with from now on.
        torch.set_num_threads(torch.get_num_threads())


def write_behind(items: Iterable[Item], write: Callable[[Item], None]) -> None:
    """Calls `write(item)` for one after the other in a thread, while the next item is made.

    Two items are in memory. What the making or writing of an item raises ends both.
    """
    with ThreadPoolExecutor(1, "writer") as thread:
        writing: Future[None] | None = None
        for item in items:
            if writing is not None:
                writing.result()
            writing = thread.submit(write, item)
        if writing is not None:
            writing.result()
