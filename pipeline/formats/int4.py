"""What the formats with INT4 weights share."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from et_moe.backends import ops
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.formats.format import StoredTensor, TensorError
from et_moe.pipeline.formats.unquantized import DTYPES
from et_moe.pipeline.storage import Int4

SCALES = {"BF16": "bfloat16", "F16": "float16"}
"""Dtypes of scales, as safetensors and as `Int4` name them."""


class Int4Format:
    """A format whose quantized weights have modules of their own tensors, `<module>.<suffix>`.

    Attributes:
        names: of the weights, quantized or not.

    A subclass names the suffixes: `VALUES`, `SCALE`, those of `FURTHER` tensors of a weight, and of
    these the `OPTIONAL` ones. It says in `_layout` what they are, and makes codes of them.
    """

    VALUES: str
    SCALE: str
    FURTHER: tuple[str, ...]
    OPTIONAL: tuple[str, ...]

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors, self.skipped = tensors, ()
        ends = tuple(f".{suffix}" for suffix in (self.VALUES, self.SCALE, *self.FURTHER))
        # A list, not a set: the order decides which of two tensors at odds a message names first.
        modules = [n.removesuffix(ends[0]) for n in tensors if n.endswith(ends[0])]
        # A quantized module keeps what has none of these names, such as a bias.
        own = {f"{module}{end}" for module in modules for end in ends}
        self._modules = {f"{module}.weight": module for module in modules}
        self._kept: dict[str, Int4] = {}
        self.names = [n for n in tensors if n not in own] + list(self._modules)

    def _layout(self, n: int, k: int, groups: int) -> dict[str, StoredTensor]:
        """What a weight `[n, k]` with so many groups a row is stored as, by suffix."""
        raise NotImplementedError

    def _codes(self, module: str, storage: Int4, read: Callable[[str], Tensor]) -> Tensor:
        """A weight as `codes.encode` makes it; `read` gives the module's tensors by suffix."""
        raise NotImplementedError

    def _columns(self, shape: tuple[int, ...]) -> int:
        """K by the shape of a weight's values, at 4 bits."""
        raise NotImplementedError

    def _groups(self, shape: tuple[int, ...]) -> int:
        """Groups of a row by the shape of a weight's scales."""
        raise NotImplementedError

    def _fail(self, module: str, suffix: str, problem: str) -> TensorError:
        return TensorError(f"{module}.{suffix}", f"{problem}: use the bf16 checkpoint")

    def kept(self, name: str) -> Int4 | None:
        if name not in self._kept and name in self._modules:
            self._kept[name] = self._storage(self._modules[name])
        return self._kept.get(name)

    def _storage(self, module: str) -> Int4:
        values = self._tensors[f"{module}.{self.VALUES}"]
        scale = self._tensors.get(f"{module}.{self.SCALE}")
        if scale is None:
            raise TensorError(f"{module}.{self.VALUES}", f"has no {self.SCALE} beside it")
        if scale.dtypes[0] not in SCALES:
            problem = f"has dtype {scale.dtypes[0]}, expected one of {[*SCALES]}"
            raise self._fail(module, self.SCALE, problem)
        if len(values.shape) != 2 or len(scale.shape) != 2:
            problem = f"has shape {values.shape} with scales {scale.shape}, expected matrices"
            raise self._fail(module, self.VALUES, problem)
        k, groups = self._columns(values.shape), self._groups(scale.shape)
        size = k // groups if groups else 0
        if size not in ops.GROUP_SIZES or size * groups != k:
            problem = f"has {groups} groups for {k} columns of 4 bits"
            expected = f"groups of one of {ops.GROUP_SIZES} columns are supported"
            raise self._fail(module, self.SCALE, f"{problem}; {expected}")
        return Int4(size, SCALES[scale.dtypes[0]])

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        module = self._modules.get(name)
        if module is None or len(shape) != 2:
            return {name: StoredTensor(DTYPES, shape)}
        (n, k), values = shape, self._tensors[f"{module}.{self.VALUES}"].shape
        found = self._columns(values) if len(values) == 2 else k
        if found != k and found * 4 % k == 0:
            bits = found * 4 // k
            raise self._fail(module, self.VALUES, f"has {bits} bits a weight, 4 are supported")
        layout = self._layout(n, k, k // self.kept(name).group_size)
        present = {
            suffix: tensor
            for suffix, tensor in layout.items()
            if suffix not in self.OPTIONAL or self._has(module, suffix)
        }
        return {f"{module}.{suffix}": tensor for suffix, tensor in present.items()}

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        module, storage = self._modules.get(name), self.kept(name)
        if module is None:
            return read(name)
        return self._codes(module, storage, lambda suffix: read(f"{module}.{suffix}"))

    def _has(self, module: str, suffix: str) -> bool:
        return f"{module}.{suffix}" in self._tensors

    def _check_order(self, module: str, suffix: str, storage: Int4, order: Tensor) -> None:
        """Raises TensorError if the groups of the columns, `[K]`, are not consecutive."""
        if not torch.equal(
            order, torch.arange(len(order), dtype=order.dtype) // storage.group_size
        ):
            raise self._fail(module, suffix, "permutes the columns (desc_act, activation order)")


def check_section(section: Mapping, expected: Mapping[str, tuple], method: str) -> None:
    """Raises ConfigError unless keys of a `quantization_config`, if present, have such values."""
    for key, allowed in expected.items():
        value = section.get(key, allowed[0])
        if value not in allowed:
            one_of = " or ".join(repr(a) for a in allowed)
            raise ConfigError(
                f"quantization_config.{key} is {value!r}; of {method} only {one_of} is supported: "
                "use the bf16 checkpoint"
            )
