"""Records the kernel launches that ops make."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from unittest import mock

from et_moe.backends.cuda.triton.common.launch import launch

_KERNELS = "et_moe.backends.cuda.triton."


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel.

    Attributes:
        kernel: the function decorated with `triton.jit`.
        arguments: the kernel's parameters by name, constexprs included.
        options: of the launch, `num_warps` and `num_stages`.
    """

    kernel: Callable
    grid: tuple
    arguments: dict[str, object]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextlib.contextmanager
def replace_launches(run: Callable[[Launch], None]) -> Iterator[None]:
    """Has `run` called for every launch that the ops' functions make inside the block, instead."""

    def replaced(kernel, grid, *args, **kwargs) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments.update((k, v) for k, v in kwargs.items() if k in names)
        options = {k: v for k, v in kwargs.items() if k not in names}
        run(Launch(kernel, tuple(grid), arguments, options))

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            users = name.startswith(_KERNELS) and name not in (__name__, launch.__module__)
            if users and vars(module).get("launch") is launch:
                stack.enter_context(mock.patch.object(module, "launch", replaced))
        yield


@contextlib.contextmanager
def record_launches(run: bool = False) -> Iterator[list[Launch]]:
    """Collects the launches that the ops' functions make inside the block.

    Args:
        run: also run the kernels; without it nothing is executed, so meta tensors will do.
    """
    launches: list[Launch] = []

    def record(found: Launch) -> None:
        launches.append(found)
        if run:
            launch(found.kernel, found.grid, **found.arguments, **found.options)

    with replace_launches(record):
        yield launches
