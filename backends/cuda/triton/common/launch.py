"""How ops launch kernels: eagerly, under the interpreter, and while `torch.export` traces them."""

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
    """Lets kernels that are launched in the block start before their predecessor ends.

    This is how a program launches them (see `dependent_launch`); eagerly it serves to time them, on
    sm_90 and later. The lowering proves of a program that no kernel reads, before it waits, what
    the kernel before it writes. Here the caller answers for that; it holds within each op.
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
    """Whether a size is 1 in every call; a symbolic size counts as larger."""
    return isinstance(size, int) and size == 1


def cdiv(a: int, b: int) -> int:
    """Ceiling division that also takes symbolic ints."""
    return triton.cdiv(a, b)
