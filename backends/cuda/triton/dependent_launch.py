"""Programmatic dependent launch: a kernel starts while the one before it still runs.

From sm_90 on (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization") a
kernel may let its successor start as soon as all of its own thread blocks have, and a successor
waits for its predecessor's end where it first needs its results. So launch latency is hidden, and a
kernel's weights are on their way before its activations exist.

Every kernel of this folder calls both functions, or neither (then it runs after its predecessor's
end and before its successor's start, as usual). The order of memory accesses stays that of a plain
sequence of kernels under two rules:

* Before `wait_for_previous` a kernel reads nothing but weights, and state that only it and its own
  former calls write; it writes nothing. What is read early is checked in the compiled code, see
  `CompileCase.early`.
* Every thread block calls `wait_for_previous`. Hence the end of a kernel implies the end of all
  kernels before it, also of those that its predecessor had not yet waited for.

Below sm_90 and in the interpreter both do nothing.
"""

import triton
import triton.language as tl  # noqa: F401 (the interpreter demands that a kernel's module has it)
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from et_moe.backends.cuda.triton.dot import interpreted


@triton.jit
def start_next():
    """Lets the next kernel start once all thread blocks of this one are here."""
    if not interpreted() and cuda_capability_geq(9):
        gdc_launch_dependents()


@triton.jit
def wait_for_previous():
    """Returns when all former kernels have ended and what they wrote can be read."""
    if not interpreted() and cuda_capability_geq(9):
        gdc_wait()
