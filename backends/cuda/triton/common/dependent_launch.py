"""Programmatic dependent launch: a kernel starts while the one before it still runs.

From sm_90 on (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization") a
kernel can let its successor start, and a successor waits for its predecessor's end where it first
needs its results. So launch latency is hidden, and weights are on their way before the activations
that they meet exist.

A kernel calls `wait_for_previous` once, in every thread block that does not return at once; only
then its successor starts. Hence, when a kernel starts, all kernels but its direct predecessor have
ended, and before `wait_for_previous` it may read whatever the predecessor does not write. (A short
kernel calls `start_next` before: then its predecessor may still run too when its successor starts.)
A kernel writes nothing before it waits. The lowering checks all this in the compiled code
(`backends/cuda/host_program.py`), and launches a kernel plainly, after its predecessor's end, where
its early reads would be too early.

Below sm_90 and in the interpreter there is nothing to wait for, and nothing is prefetched.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from et_moe.backends.cuda.triton.common.interpreter import is_interpreted


@triton.jit
def start_next():
    """Lets the next kernel start once all thread blocks of this one have called it."""
    if not is_interpreted() and cuda_capability_geq(9):
        gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Returns when all kernels before have ended and what they wrote can be read."""
    if not is_interpreted() and cuda_capability_geq(9):
        gdc_wait()
        # Not before: the successor would take room and bandwidth while it can only wait.
        gdc_launch_dependents()


@triton.jit
def prefetch(start, BYTES: tl.constexpr):
    """Has one thread request BYTES (a multiple of 16) into the L2 cache."""
    if not is_interpreted() and cuda_capability_geq(9):
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
            " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r",
            [start.to(tl.uint64, bitcast=True), BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
