"""Rows that the kernel in front of a linear layer quantizes to INT8, which spares a launch.

They lie as `linear/few_rows.py` reads them, and have the bits that `ops.quantize_int8` gives the
rows of the dtype in between.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.int4 import NIBBLE_SCALE
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.ops import ACTIVATION_TILE


class QuantizedRows(NamedTuple):
    """Rows of K columns, in tiles of `ACTIVATION_TILE` columns.

    Attributes:
        q: `int8 [padded_m, K]`; rows behind the last one are anything.
        scale: `float32 [K / ACTIVATION_TILE, padded_m]`, times the layer's `scale_factor`.
    """

    q: torch.Tensor
    scale: torch.Tensor


class RowFormat(NamedTuple):
    """What a linear layer wants of the kernel in front of it.

    Attributes:
        padded_m: rows that there are room for.
        scale_factor: of the scales of its weights.
    """

    padded_m: int
    scale_factor: float

    @classmethod
    def of_weights(cls, rows: int, bits: int) -> "RowFormat":
        """That of a layer with INT4 or INT8 weights, which takes up to so many rows."""
        padded_m = 8 * triton.cdiv(rows, 8)
        return cls(padded_m, NIBBLE_SCALE.value if bits == 4 else 1.0)


class Rows(NamedTuple):
    """Room for the rows that a kernel writes, and what it is told of them.

    Attributes:
        out: the rows, or `QuantizedRows`.
        pointers: out_ptr and scale_ptr, None if rows are not quantized.
        shape: the constexprs PADDED_M and SCALE_FACTOR.
    """

    out: torch.Tensor | QuantizedRows
    pointers: tuple[torch.Tensor, torch.Tensor | None]
    shape: dict[str, int | float]


def allocate_rows(
    like: torch.Tensor, rows: int | torch.SymInt, columns: int, wanted: RowFormat | None
) -> Rows:
    """Room for so many rows and columns in the dtype of `like`, or quantized if wanted, for which
    columns have to be whole tiles."""
    if wanted is None:
        out = like.new_empty((rows, columns))
        return Rows(out, (out, None), {"PADDED_M": 0, "SCALE_FACTOR": 1.0})
    q = like.new_empty((wanted.padded_m, columns), dtype=torch.int8)
    shape = (columns // ACTIVATION_TILE, wanted.padded_m)
    out = QuantizedRows(q, like.new_empty(shape, dtype=torch.float32))
    return Rows(out, out, {"PADDED_M": wanted.padded_m, "SCALE_FACTOR": wanted.scale_factor})


@triton.jit
def quantize_tile(x, DTYPE: tl.constexpr):
    """Rows x of one tile, fp32 `[R, ACTIVATION_TILE]`, rounded to DTYPE and then to INT8: int8 of
    that shape and fp32 scales `[R]`."""
    x = x.to(DTYPE).to(tl.float32)
    inverse, scale = compute_int8_scale(tl.max(tl.abs(x), axis=1))
    return round_to_int8(x * inverse[:, None]).to(tl.int8), scale
