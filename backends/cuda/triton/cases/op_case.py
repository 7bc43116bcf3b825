"""A call of an op at the shapes of a true model, for tools that compile, count, tune or time it.

Nothing in this folder, and no `<op>/cases.py`, takes part when a program is compiled.

A case is a call of an op, not the signature of a kernel: run on meta tensors under
`record_launches` it gives the launches that the op really makes, so what is checked is what ships.
"""

import dataclasses
from collections.abc import Callable

import torch

PREFILL_TOKENS = 4095
"""Stands for a symbolic prefill length: large, and not a multiple of 16, since the compiler cannot
assume that of a symbolic size either."""


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One call of an op at the shapes of a true model.

    Attributes:
        name: of the case in tables, "linear_w4a8/qkv_proj".
        op: the function that launches the op's kernels.
        arguments: `(m, device) -> keyword arguments` of `op` for m tokens. On the meta device only
            shapes and dtypes count; elsewhere the values must be valid (ids in range, ...).
        tables: names of the tuning tables that are tuned for this case. It reaches all of their
            entries; a case without tables serves to compile and to count.
        tokens: values of m that together reach every kernel of the op; the tools add a value for
            each entry of `tables`, unless there is a single one here. `PREFILL_TOKENS` stands for
            a symbolic m.
        gemms: names of the kernels that must use INT8 tensor-core instructions.
        streams: name of a kernel -> those of its pointer parameters that must be read with global
            loads of 16 bytes.
    """

    name: str
    op: Callable
    arguments: Callable[[int, torch.device], dict]
    tables: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (1, PREFILL_TOKENS)
    gemms: frozenset[str] = frozenset()
    streams: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def random_tensor(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Numbers of a normal distribution."""
    return torch.randn(shape, device=device).to(dtype)
