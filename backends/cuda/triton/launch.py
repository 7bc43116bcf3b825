"""How an op of this folder launches a kernel, eagerly, under the interpreter, or while traced."""

from collections.abc import Callable

import triton
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction


def launch(kernel: Callable, grid: tuple, *args, **kwargs) -> None:
    """Runs `kernel[grid](*args, **kwargs)` so that `torch.export` and AOTInductor can trace it.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: one to three sizes; ints or symbolic ints.
        args, kwargs: the kernel's arguments, constexprs and `num_warps` / `num_stages`.
    """
    # Under TRITON_INTERPRET=1 the decorator makes another class, which torch cannot wrap.
    runner = wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
    runner[grid](*args, **kwargs)


def cdiv(a: int, b: int) -> int:
    """Ceiling division that also takes symbolic ints."""
    return triton.cdiv(a, b)
