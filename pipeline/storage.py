"""How a weight is stored: INT4 in groups, INT8 by row, or dense. One class each.

A storage knows the tensors that it keeps of a weight, how they are made, and the ops that multiply
with them. `Linear`, `Experts` and `Embedding` (`layers.py`) hold one each; which part of a model
has which is a table, `Storages`. A new storage is a class here and a line in `STORAGES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from et_moe.backends import ops
from et_moe.pipeline.codes import CODES, decode

et = torch.ops.et_moe

Entry = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


SCALE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ops.SCALE_DTYPES}


def scale_name(name: str) -> str:
    """Name of the scales beside the values: `x.weight` has `x.scale`, `x.w13` has `x.w13_scale`."""
    module, _, leaf = name.rpartition(".")
    scale = "scale" if leaf == "weight" else f"{leaf}_scale"
    return f"{module}.{scale}" if module else scale


def is_scale(name: str) -> bool:
    """Whether a tensor has such a name."""
    leaf = name.rpartition(".")[2]
    return leaf == "scale" or leaf.endswith("_scale")


@dataclass(frozen=True)
class Storage:
    """How the weights of one part of a model are stored.

    Attributes:
        kind: names the class in a bundle.
    """

    kind: ClassVar[str]

    def tensors(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Entry]:
        """What is kept of a weight: name -> dtype and shape, values first.

        Args:
            name: of the weight, the name of its values.
            shape: `[..., N, K]`, K being the dimension that products sum over.
            dtype: of weights that are not quantized.

        Raises:
            ValueError: a shape that this storage does not take.
        """
        raise NotImplementedError

    def quantize(
        self, weight: Tensor, method: str, importance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The tensors of `tensors` for rows of a weight, float `[..., N, K]`; `Int4` takes codes
        (`pipeline/codes.py`), too, and keeps their values and scales.

        Args:
            method, importance: how INT4 scales are chosen, see `ops.quantize_w4`.
        """
        raise NotImplementedError

    def linear(
        self,
        x: Tensor,
        weight: Sequence[Tensor],
        activation_dtype: str,
        norm: Tensor | None,
        eps: float,
        residual: Tensor | None,
    ) -> Tensor:
        """The product of `ops.linear` with a stored weight `[N, K]`."""
        raise NotImplementedError

    def experts(
        self,
        x: Tensor,
        w13: Sequence[Tensor],
        w2: Sequence[Tensor],
        activation_dtype: str,
        topk_weights: Tensor,
        topk_ids: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        """The mixture of `ops.moe` with stored weights `[E, 2I, H]` and `[E, H, I]`."""
        raise NotImplementedError

    def embedding(self, ids: Tensor, weight: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Rows `[T, H]` in `dtype` of a stored table `[V, H]`; `ids` int64 `[T]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Int4(Storage):
    """Symmetric INT4 with a scale per `group_size` inputs, see `ops.quantize_w4`.

    `scale_dtype` is "bfloat16", or "float16" for weights that arrive with such scales. Activations
    in front of the products are INT8 (W4A8) or stay in the model's dtype (W4A16).
    """

    group_size: int = 128
    scale_dtype: str = "bfloat16"
    kind: ClassVar[str] = "int4"

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or self.group_size not in ops.GROUP_SIZES:
            expected = f"expected one of {ops.GROUP_SIZES}"
            raise ValueError(f"group size {self.group_size!r}: {expected}")
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_DTYPES:
            expected = f"expected one of {tuple(SCALE_DTYPES)}"
            raise ValueError(f"dtype of scales {self.scale_dtype!r}: {expected}")

    def tensors(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Entry]:
        *rows, k = shape
        if k % self.group_size:
            what = name.removesuffix(".weight")
            raise ValueError(
                f"group size {self.group_size} does not divide the {k} columns of {what}"
            )
        return {
            name: (torch.uint8, (*rows, k // 2)),
            scale_name(name): (SCALE_DTYPES[self.scale_dtype], (*rows, k // self.group_size)),
        }

    def quantize(
        self, weight: Tensor, method: str, importance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        scale_dtype = SCALE_DTYPES[self.scale_dtype]
        if weight.dtype == CODES:
            return decode(weight, self.group_size, scale_dtype)
        return ops.quantize_w4(weight, self.group_size, method, scale_dtype, importance)

    def linear(self, x, weight, activation_dtype, norm, eps, residual):
        op = et.linear_w4a8 if activation_dtype == "int8" else et.linear_w4a16
        return op(x, *weight, self.group_size, norm, eps, residual)

    def experts(self, x, w13, w2, activation_dtype, topk_weights, topk_ids, residual):
        op = et.moe_w4a8 if activation_dtype == "int8" else et.moe_w4a16
        return op(x, *w13, *w2, topk_weights, topk_ids, self.group_size, residual)

    def embedding(self, ids, weight, dtype):
        return et.embedding_w4(ids, *weight, self.group_size, dtype)


@dataclass(frozen=True)
class Int8PerRow(Storage):
    """Symmetric INT8 with a scale per row, see `ops.quantize_w8`.

    Activations in front of the products are INT8 (W8A8) or stay in the model's dtype (W8A16).
    """

    kind: ClassVar[str] = "int8_per_row"

    def tensors(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Entry]:
        *rows, k = shape
        return {
            name: (torch.int8, (*rows, k)),
            scale_name(name): (torch.bfloat16, (*rows, 1)),
        }

    def quantize(
        self, weight: Tensor, method: str, importance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return ops.quantize_w8(weight)

    def linear(self, x, weight, activation_dtype, norm, eps, residual):
        op = et.linear_w8a8 if activation_dtype == "int8" else et.linear_w8a16
        return op(x, *weight, norm, eps, residual)

    def experts(self, x, w13, w2, activation_dtype, topk_weights, topk_ids, residual):
        op = et.moe_w8a8 if activation_dtype == "int8" else et.moe_w8a16
        return op(x, *w13, *w2, topk_weights, topk_ids, residual)

    def embedding(self, ids, weight, dtype):
        return et.embedding_w8(ids, *weight, dtype)


@dataclass(frozen=True)
class Dense(Storage):
    """The weight as it is, in the model's dtype."""

    kind: ClassVar[str] = "dense"

    def tensors(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Entry]:
        return {name: (dtype, tuple(shape))}

    def quantize(
        self, weight: Tensor, method: str, importance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        ops.check_finite(weight)
        return (weight,)

    def linear(self, x, weight, activation_dtype, norm, eps, residual):
        return et.linear(x, *weight, norm, eps, residual)

    def experts(self, x, w13, w2, activation_dtype, topk_weights, topk_ids, residual):
        return et.moe(x, *w13, *w2, topk_weights, topk_ids, residual)

    def embedding(self, ids, weight, dtype):
        return torch.nn.functional.embedding(ids, *weight)


STORAGES: dict[str, type[Storage]] = {kind.kind: kind for kind in (Int4, Int8PerRow, Dense)}

Storages = Mapping[str, Storage]
"""Part of a model ("experts", "head", …) -> its storage."""


RECIPES = {
    "4w": {"experts": "4w", "linear": "4w", "embedding": "8w"},
    "mixed": {"experts": "4w", "linear": "8w", "embedding": "8w"},
    "dense": {"experts": "none", "linear": "none", "embedding": "none"},
}
"""Name of a recipe -> what a part is -> the value that a flag would have."""

DEFAULT_RECIPE = "mixed"
"""Of checkpoints on the command line: the one of least bits that comes close enough to bf16, see
docs/results.md."""


def flag_of(part: str) -> str:
    """The flag of the command line for a part."""
    return f"--q{part.replace('_', '-')}"


def choose_storages(
    parts: Mapping[str, str],
    qlinear: str | None = None,
    group_size: int = 128,
    qembedding: str | None = None,
    recipe: str = "4w",
    by_part: Mapping[str, str | None] = MappingProxyType({}),
) -> dict[str, Storage]:
    """The storage of each part of a model by the flags of the command line.

    A value is "4w" for INT4, "8w" for INT8 with a scale per row, or "none" to keep weights as they
    are; None leaves the choice to what comes next.

    Args:
        parts: `Model.parts`, name -> "embedding", "linear" or "experts".
        qlinear: value of all linear layers and experts, in place of the recipe's.
        group_size: weights per INT4 scale.
        qembedding: value of the embedding, in place of the recipe's.
        recipe: one of `RECIPES`.
        by_part: values of single parts, in place of all others.

    Raises:
        ValueError: names the flag's value and what was expected.
    """
    storages = {"4w": Int4(group_size), "8w": Int8PerRow(), "none": Dense()}
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r}: expected one of {tuple(RECIPES)}")
    chosen = {}
    for part, kind in parts.items():
        general = ("qembedding", qembedding) if kind == "embedding" else ("qlinear", qlinear)
        flags = ((flag_of(part).lstrip("-"), by_part.get(part)), general)
        default = ("recipe", RECIPES[recipe][kind])
        flag, value = next((f for f in flags if f[1] is not None), default)
        if value not in storages:
            raise ValueError(f"{flag} {value!r}: expected one of {[*storages]} for {part}")
        chosen[part] = storages[value]
    return chosen


def storages_to_json(storages: Storages) -> dict[str, dict[str, Any]]:
    """Storages as a bundle keeps them: part -> {"storage": kind, and the storage's own fields}."""
    return {part: {"storage": s.kind, **asdict(s)} for part, s in storages.items()}


def storages_from_json(value: object, parts: Mapping[str, str]) -> dict[str, Storage]:
    """Inverse of `storages_to_json`.

    Raises:
        ValueError: names the part that is missing, unknown or malformed.
    """
    if not isinstance(value, dict) or set(value) != set(parts):
        found = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"found {found!r}, expected an object of the parts {sorted(parts)}")
    storages = {}
    for part in parts:
        given = dict(value[part]) if isinstance(value[part], dict) else {}
        kind = given.pop("storage", None)
        if not isinstance(kind, str) or kind not in STORAGES:
            raise ValueError(f"{part}.storage is {kind!r}, expected one of {tuple(STORAGES)}")
        known = {field.name for field in fields(STORAGES[kind])}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{part} has {unknown}, which {kind} has not: {sorted(known)}")
        try:
            storages[part] = STORAGES[kind](**given)
        except ValueError as e:
            raise ValueError(f"{part}: {e}") from None
    return storages


@dataclass(frozen=True)
class Precision:
    """In what numbers a program computes.

    Attributes:
        storages: how the weights of each part are stored.
        activation_dtype: "int8" quantizes activations in front of INT4 and INT8 weights, "bf16"
            leaves them in `dtype`. It belongs to a program, not to a bundle.
        dtype: float32 or bfloat16, of activations, caches and weights that are not quantized.
        recurrent_state_dtype: float32 or bfloat16, of the recurrent state of linear attention.
    """

    storages: Storages
    activation_dtype: str = "int8"
    dtype: torch.dtype = torch.bfloat16
    recurrent_state_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.activation_dtype not in ("int8", "bf16"):
            expected = "expected one of ('int8', 'bf16')"
            raise ValueError(f"activation dtype {self.activation_dtype!r}: {expected}")
