"""How kernels are timed: replayed as a CUDA graph, over inputs that do not fit the L2 cache."""

import contextlib
import os
import statistics
from collections.abc import Callable

import torch

from et_moe.backends.cuda.gpu import ptxas_environment
from et_moe.backends.cuda.triton.common.launch import dependent_launches

MAX_COPIES = 32


def require_gpu() -> torch.device:
    """The GPU; without one the process ends with a message.

    From then on Triton assembles kernels as it does for an exported program.
    """
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU found: this measures on one")
    with contextlib.suppress(RuntimeError):  # no wheel of it: the environment may name one
        os.environ.update(ptxas_environment())
    return torch.device("cuda")


def launched_as_in_programs() -> contextlib.AbstractContextManager:
    """A block in which our kernels start as those of an exported program do on this GPU."""
    if torch.cuda.get_device_capability() >= (9, 0):
        return dependent_launches()
    return contextlib.nullcontext()


def rotations(size: int, l2_bytes: int) -> int:
    """How many copies of `size` bytes are three times as large as the L2 cache; `MAX_COPIES` at
    most."""
    return min(MAX_COPIES, -(-3 * l2_bytes // max(size, 1)))


def rotated(make: Callable[[], dict], l2_bytes: int) -> list[dict]:
    """Argument sets to cycle through, together at least three times as large as the L2 cache.

    Tensors larger than half of the cache are shared between the sets; what the other arguments pick
    from them, such as experts, differs all the same.
    """
    first = make()

    def small(value) -> bool:
        return isinstance(value, torch.Tensor) and value.nbytes <= l2_bytes // 2

    size = sum(value.nbytes for value in first.values() if small(value))
    sets = [first]
    for _ in range(rotations(size, l2_bytes) - 1):
        made = make()
        sets.append({k: v if small(v) else first[k] for k, v in made.items()})
    return sets


def microseconds(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of a call, where `calls` follow each other in a CUDA graph."""
    for call in calls[:2]:  # compiles, and tunes what tunes itself
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
