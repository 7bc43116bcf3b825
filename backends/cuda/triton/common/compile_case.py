"""What a kernel file says about itself: tools compile, count, tune and time its kernels from it.

Each kernel file of this folder offers

    compile_cases() -> list[CompileCase]            its ops at the model's true shapes
    tune_candidates() -> dict[str, list[dict]]      configurations worth trying, by tuning table

A case is a call of an op, not a compiler signature: running it on meta tensors with
`record_launches` gives the exact launches (kernel, grid, argument types, divisibility, constexprs,
options) that the op makes, hence what is checked is what is shipped.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from et_moe.backends.cuda.triton.common.launch import launch

PREFILL_TOKENS = 4095
"""Stands for a symbolic prefill length: large, and not a multiple of 16, since the compiler cannot
assume that of a symbolic size either."""


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One call of an op at the shapes of the true model.

    Attributes:
        name: of the case in tables, "linear_w4a8/qkv".
        op: the op's function.
        arguments: `(m, device) -> keyword arguments` of `op` for m tokens. On the meta device only
            shapes and dtypes count; elsewhere the values must be valid (ids in range, ...).
        tables: names of the tuning tables that the op looks up.
        tokens: values of m that together reach every kernel of the op; the bucket bounds of
            `tables` are added by the tools. `PREFILL_TOKENS` stands for a symbolic m.
        gemms: names of kernel functions that must use int8 tensor-core instructions.
        streams: kernel function name -> its pointer parameters that must be read with 16-byte
            global loads.
    """

    name: str
    op: Callable
    arguments: Callable[[int, torch.device], dict]
    tables: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (1, PREFILL_TOKENS)
    gemms: frozenset[str] = frozenset()
    streams: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded kernel launch; `arguments` has every parameter by name, constexprs included."""

    kernel: Callable
    grid: tuple
    arguments: dict[str, object]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextlib.contextmanager
def record_launches(run: bool = False) -> Iterator[list[Launch]]:
    """Collects the launches that ops of this package make inside the block.

    Args:
        run: also run the kernels; without it nothing is executed, so meta tensors will do.
    """
    launches: list[Launch] = []

    def recorder(kernel, grid, *args, **kwargs) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments.update((k, v) for k, v in kwargs.items() if k in names)
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(Launch(kernel, tuple(grid), arguments, options))
        if run:
            launch(kernel, grid, *args, **kwargs)

    package, others = __name__.rsplit(".", 2)[0], (__name__, launch.__module__)
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            users = name.startswith(package) and name not in others
            if users and vars(module).get("launch") is launch:
                stack.enter_context(mock.patch.object(module, "launch", recorder))
        yield launches
