"""Programmatic dependent launch: a kernel starts while the one before it still runs.

From sm_90 on (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization") a
kernel can let its successor start early, and the successor waits for the kernel's end where it
first needs its results. This hides the latency of launches, and weights are on their way before the
activations that they are multiplied with exist.

Every thread block of a kernel, unless it returns at once, calls `wait_for_previous` once, and the
successor does not start before that. Hence, when a kernel starts, all kernels before its direct
predecessor have ended, and ahead of `wait_for_previous` it may read whatever the predecessor does
not write. It must not write anything ahead of it. A short kernel may call `start_next` first; its
predecessor may then still run, too, when its successor starts.

The lowering checks all this in the compiled code (`backends/cuda/host_program.py`). Where a kernel
would read too early, it is launched plainly, after its predecessor's end.

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
    """Returns when all kernels before this one have ended and their results can be read."""
    if not is_interpreted() and cuda_capability_geq(9):
        gdc_wait()
        # Not earlier: the successor would occupy registers and bandwidth only to wait.
        gdc_launch_dependents()


@triton.jit
def prefetch(start, BYTES: tl.constexpr):
    """Has one thread bring the BYTES (a multiple of 16) from pointer `start` into the L2 cache."""
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


@triton.jit
def prefetch_each(pointers):
    """Brings what each of the pointers points to into the L2 cache. Unlike a load it takes no
    register until the value is needed."""
    if not is_interpreted():
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.uint64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
