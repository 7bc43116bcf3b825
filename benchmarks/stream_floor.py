"""What reading alone takes: a floor for launches that move a few megabytes.

A launch that moves little never reaches the bandwidth of a large copy: it has to start, and its
first bytes have a latency. Hence kernels that only read, launched and timed like those measured.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.benchmarks import roofline
from et_moe.benchmarks.timing import launched_as_in_programs, microseconds, rotations

CONFIGS = ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
"""Words of 4 bytes that a Triton program reads, and its warps. A thread has 2 to 8 loads of 16
bytes."""


@triton.jit
def read_kernel(source, sums, words, BLOCK: tl.constexpr):
    """Sums BLOCK int32 of source (words of them in all, a multiple of 16) into `sums[program]`.

    All loads are under way before the kernel waits for its predecessor, as those of weights are.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < words, other=0, eviction_policy="evict_first")
    wait_for_previous()
    tl.store(sums + tl.program_id(0), tl.sum(x, 0))


def read_all(sources: list[torch.Tensor], sums: torch.Tensor, block: int, warps: int) -> None:
    """Launches `read_kernel` on one source after the other."""
    for source in sources:
        words = source.numel()
        grid = (cdiv(words, block),)
        launch(read_kernel, grid, source, sums, words, BLOCK=block, num_warps=warps)


@dataclasses.dataclass
class Floor:
    """Measures floors on a device, each of them once.

    Attributes:
        l2_bytes: size of the device's L2 cache.
        known: microseconds by the bytes of each launch.
    """

    device: torch.device
    l2_bytes: int
    known: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)

    def __call__(self, kernels: list[roofline.Kernel]) -> float:
        """Microseconds of as many launches as `kernels`, each of which reads what its kernel moves.

        The fastest of `CONFIGS` counts. Bytes that a kernel writes are read, too.
        """
        # 64 bytes at least: a kernel that moves nothing is launched all the same.
        sizes = tuple(max(cdiv(int(kernel.bytes), 64), 1) * 64 for kernel in kernels)
        if sizes not in self.known:
            self.known[sizes] = self._measure(sizes)
        return self.known[sizes]

    def _measure(self, sizes: tuple[int, ...]) -> float:
        def words(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self.device)

        copies = rotations(sum(sizes), self.l2_bytes)
        sets = [[words(size // 4) for size in sizes] for _ in range(copies)]
        sums = words(cdiv(max(sizes), 4 * CONFIGS[0][0]))
        times = []
        with launched_as_in_programs():
            for block, warps in CONFIGS:
                calls = [lambda s=s, b=block, w=warps: read_all(s, sums, b, w) for s in sets]
                times.append(microseconds(calls))
        return min(times)
