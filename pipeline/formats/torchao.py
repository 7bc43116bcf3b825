"""torchao's quantized tensors, as they lie flattened in a safetensors file.

The data of a tensor `[N, K]` are stored tensors of their own:

* `Int4Tensor`: `qdata` uint8 `[N, K/2]`, the even column in the low nibble, `scale` and
  `zero_point` `[K/g, N]`; the weight is (value - zero) * scale.
* `IntxUnpackedToInt8Tensor`: `qdata` int8 `[N, K]`, `scale` and `zero_point` `[N, K/g]`; the
  weight is (value - zero) * scale.
* `Int4TilePackedTo4dTensor`: `qdata` int32 `[N/8, K/128, 32, 4]`, in the order in which tensor
  cores take it, `scale_and_zero` `[K/g, N, 2]`, rows and columns padded; the weight is
  (value - 8) * scale + zero.

Symmetric INT4 in groups keeps its values and scales. Everything else is dequantized, to float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from et_moe.backends import ops
from et_moe.pipeline.codes import encode
from et_moe.pipeline.formats.format import Contents, HeaderError, StoredTensor, TensorError
from et_moe.pipeline.formats.int4 import SCALES
from et_moe.pipeline.formats.unquantized import DTYPES
from et_moe.pipeline.storage import Int4

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Weight:
    """A weight of the file that is not quantized; the quantized ones extend it.

    Attributes:
        name: in ExecuTorch's model.
        keys: the stored tensor of each of its data.
        block: columns that share a scale.
        dims: of the shapes that it can have; None for any.
    """

    name: str
    keys: Mapping[str, str]
    block: int = 0
    dims: ClassVar[int | None] = None

    def stored(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """What a weight of this shape is stored as, by data."""
        return {"": StoredTensor(DTYPES, shape)}

    def kept(self, contents: Contents) -> Int4 | None:
        """The storage with the same values and scales, if there is one."""
        return None

    def read(self, data: Read, shape: tuple[int, ...], kept: bool) -> Tensor:
        """The weight, or its codes if it is kept; `data` reads its data by name."""
        return data("")

    def _groups(self, columns: int) -> int:
        """How many blocks a row of so many columns has."""
        if columns % self.block:
            problem = f"has block_size {self.block}, which does not divide {columns} columns"
            raise HeaderError(self.name, problem)
        return columns // self.block

    def _symmetric(self, contents: Contents, zero: int) -> Int4 | None:
        """The storage of INT4 values with this zero point everywhere."""
        dtype = contents.tensors[self.keys["scale"]].dtypes[0]
        if self.block not in ops.GROUP_SIZES or dtype not in SCALES:
            return None
        if not (contents.read(self.keys["zero_point"]) == zero).all():
            return None
        return Int4(self.block, SCALES[dtype])


class PackedExperts(Weight):
    """Tables of experts, `w1` and `w2`."""

    dims: ClassVar[int | None] = 3

    def stored(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        *rows, k = shape
        return {
            "qdata": StoredTensor(("I8",), (*rows, k // 2)),
            "scale": StoredTensor(tuple(SCALES), (*rows, self._groups(k))),
        }

    def kept(self, contents: Contents) -> Int4 | None:
        return Int4(self.block, SCALES[contents.tensors[self.keys["scale"]].dtypes[0]])

    def read(self, data: Read, shape: tuple[int, ...], kept: bool) -> Tensor:
        packed, scale = data("qdata").view(torch.uint8), data("scale")
        return encode(packed.flatten(0, -2), scale.flatten(0, -2)).view(shape)


class Int4Weight(Weight):
    """torchao's `Int4Tensor`."""

    dims: ClassVar[int | None] = 2

    def stored(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        n, k = shape
        scales = StoredTensor(DTYPES, (self._groups(k), n))
        return {
            "qdata": StoredTensor(("U8",), (n, k // 2)),
            "scale": scales,
            "zero_point": scales,
        }

    def kept(self, contents: Contents) -> Int4 | None:
        return self._symmetric(contents, 8)

    def read(self, data: Read, shape: tuple[int, ...], kept: bool) -> Tensor:
        packed, scale = data("qdata"), data("scale").t()
        if kept:
            return encode(packed, scale)
        zero = data("zero_point").t().float() - 8
        return _affine(ops.unpack_int4(packed), scale, zero)


class IntxWeight(Weight):
    """torchao's `IntxUnpackedToInt8Tensor`."""

    dims: ClassVar[int | None] = 2

    def stored(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        n, k = shape
        blocks = (n, self._groups(k))
        return {
            "qdata": StoredTensor(("I8",), shape),
            "scale": StoredTensor(DTYPES, blocks),
            "zero_point": StoredTensor(("I8", *DTYPES), blocks),
        }

    def read(self, data: Read, shape: tuple[int, ...], kept: bool) -> Tensor:
        values, scale = data("qdata"), data("scale")
        if not kept:
            return _affine(values, scale, data("zero_point").float())
        if values.min() < -8 or values.max() > 7:
            raise TensorError(self.keys["qdata"], "has values that are not of 4 bits")
        return encode(ops.pack_int4(values), scale)


class Intx4Weight(IntxWeight):
    """The same with values of 4 bits."""

    def kept(self, contents: Contents) -> Int4 | None:
        return self._symmetric(contents, 0)


class TilePackedWeight(Weight):
    """torchao's `Int4TilePackedTo4dTensor`, for the tinygemm kernels of PyTorch."""

    dims: ClassVar[int | None] = 2

    def stored(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        n, k = -(-shape[0] // 8) * 8, -(-shape[1] // 1024) * 1024
        return {
            "qdata": StoredTensor(("I32",), (n // 8, k // 128, 32, 4)),
            "scale_and_zero": StoredTensor(DTYPES, (self._groups(k), n, 2)),
        }

    def read(self, data: Read, shape: tuple[int, ...], kept: bool) -> Tensor:
        values = unpack_tiles(data("qdata"))
        scale, zero = data("scale_and_zero").float().transpose(0, 1).unbind(-1)
        groups = values.float().sub_(8).unflatten(-1, (scale.shape[1], -1))
        weight = groups.mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).flatten(-2)
        return weight[: shape[0], : shape[1]].contiguous()


def unpack_tiles(words: Tensor) -> Tensor:
    """The values 0..15, `uint8 [N, K]`, of int32 `[N/8, K/128, 32, 4]`.

    A tile of 8 rows and 128 columns belongs to the 32 lanes of a warp. Lane t has row t / 4, and
    of each 16 columns those at 2 (t % 4) and at 8 + 2 (t % 4), and the ones behind them. An element
    has eight values of 32 columns, first the four in even columns, from the lowest nibble on.
    """
    packed = words.contiguous().view(torch.uint8).unflatten(-1, (4, 2, 2))
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    rows, columns, _, _, *_ = words.shape
    lanes = nibbles.view(rows, columns, 8, 4, 4, 2, 2, 2)
    # row tile, column tile, row, pair, 32 columns, odd, 16 columns, 8 columns
    ordered = lanes.permute(0, 2, 1, 4, 6, 7, 3, 5)
    return ordered.reshape(8 * rows, 128 * columns)


def _affine(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(value - zero) * scale in float32, with values `[N, K]`, scales and zeros `[N, K/g]`."""
    groups = values.float().unflatten(-1, (scale.shape[1], -1))
    return groups.sub_(zero.unsqueeze(-1)).mul_(scale.float().unsqueeze(-1)).flatten(-2)


CLASSES: dict[str, tuple[type[Weight], tuple[str, ...]]] = {
    "Int4Tensor": (Int4Weight, ("qdata", "scale", "zero_point")),
    "IntxUnpackedToInt8Tensor": (IntxWeight, ("qdata", "scale", "zero_point")),
    "Int4TilePackedTo4dTensor": (TilePackedWeight, ("qdata", "scale_and_zero")),
}
"""Classes of torchao -> what reads them, and their data."""
