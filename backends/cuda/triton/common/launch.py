"""How an op of this folder launches a kernel, eagerly, under the interpreter, or while traced."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import torch
import triton
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

_DEPENDENT = contextvars.ContextVar("dependent_launches", default=False)


@contextlib.contextmanager
def dependent_launches() -> Iterator[None]:
    """Kernels launched eagerly in this block start before their predecessor ends, as those of a
    program do (see `dependent_launch`); for timing, on sm_90 and later.

    What the lowering proves of a program's calls, the caller answers for: before it waits, no
    kernel reads what the one launched before it writes. It holds within each op of this folder.
    """
    token = _DEPENDENT.set(True)
    try:
        yield
    finally:
        _DEPENDENT.reset(token)


def launch(kernel: Callable, grid: tuple, *args, **kwargs) -> None:
    """Runs `kernel[grid](*args, **kwargs)` so that `torch.export` and AOTInductor can trace it.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three sizes; ints or symbolic ints.
        args, kwargs: the kernel's arguments, constexprs and `num_warps` / `num_stages`.
    """
    if _DEPENDENT.get():
        kernel[grid](*args, launch_pdl=True, **kwargs)
        return
    # Under TRITON_INTERPRET=1 the decorator makes another class, which torch cannot wrap.
    runner = wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
    runner[grid](*args, **kwargs)


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a dimension is 1 in every call; a symbolic one never is."""
    return isinstance(size, int) and size == 1


def cdiv(a: int, b: int) -> int:
    """Ceiling division that also takes symbolic ints."""
    return triton.cdiv(a, b)
