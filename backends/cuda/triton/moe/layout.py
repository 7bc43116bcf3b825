"""The order in which the kernels of the experts read weights, versioned.

A weight `[N, K]` is cut into blocks of 64 rows by 128 columns, padded with zeros. The blocks of the
same rows follow each other, so that a thread block streams contiguous memory. A block of INT4
weights is 4 KB, 64 rows of 64 bytes. Byte j has column j in its low and column j + 64 in its high
nibble, in two's complement, so that both nibbles of a run of bytes are plain operands of a dot
product (`common/int4.py`). INT8 and float weights keep the order of the columns.
"""

import torch
import triton

from et_moe.backends.cuda.triton.common.int4_packing import ZERO_BYTE, pack_nibbles

LAYOUT_VERSION = 1
"""Version of what the functions here make; files of prepacked weights record it."""

ROWS = 64
COLUMNS = 128


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad(x: torch.Tensor, rows: int, columns: int, value: int = 0) -> torch.Tensor:
    """x with its last two dimensions padded with `value` to rows and columns."""
    if x.shape[-2:] == (rows, columns):
        return x
    out = x.new_full((*x.shape[:-2], rows, columns), value)
    out[..., : x.shape[-2], : x.shape[-1]] = x
    return out


def _cut_blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`[..., N, K]` as `[..., rows/64, columns/128, 64, 128]`, a view; of INT4 weights, two to a
    byte, K and 128 are half as many."""
    each, zero = (2, ZERO_BYTE) if weight.dtype == torch.uint8 else (1, 0)
    padded = _pad(weight, rows, columns // each, zero)
    return padded.unflatten(-1, (-1, COLUMNS // each)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)


def _cut_scale_blocks(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """`[..., N, G]` to `[..., rows/64, groups, 64]`, float16 if it was, else bfloat16."""
    scale = scale if scale.dtype == torch.float16 else scale.bfloat16()
    padded = _pad(scale, rows, groups)
    return padded.unflatten(-2, (-1, ROWS)).transpose(-2, -1).contiguous()


def _cut_tables(
    w13: torch.Tensor, w2: torch.Tensor, *dtypes: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of both tables of a bundle, as views: `[E, I'/64, H'/128, 2, 64, 128]` (gate, up)
    and `[E, H'/64, I'/128, 64, 128]`, see `_cut_blocks`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.dtype not in dtypes or weight.dtype != w13.dtype or weight.dim() != 3:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found = f"{weight.dtype} {tuple(weight.shape)}"
            raise ValueError(f"{name}: expected {wanted} [E, N, K], got {found}")
    each = 2 if w13.dtype == torch.uint8 else 1
    experts, hidden, inner = len(w13), each * w13.shape[2], w13.shape[1] // 2
    if tuple(w2.shape) != (experts, hidden, inner // each):
        raise ValueError(
            f"w2: expected {(experts, hidden, inner // each)} for w13 {tuple(w13.shape)}, "
            f"got {tuple(w2.shape)}"
        )
    hidden_up, inner_up = _round_up(hidden, COLUMNS), _round_up(inner, COLUMNS)
    gate_up = _cut_blocks(w13.unflatten(1, (2, -1)), inner_up, hidden_up)
    return gate_up.permute(0, 2, 3, 1, 4, 5), _cut_blocks(w2, hidden_up, inner_up)


def _check_scale(name: str, weight: torch.Tensor, scale: torch.Tensor, group: int | None) -> None:
    groups = 1 if group is None else 2 * weight.shape[2] / group
    expected = (*weight.shape[:2], int(groups))
    if tuple(scale.shape) != expected or groups % 1:
        raise ValueError(
            f"{name}_scale: expected {expected} for {name} {tuple(weight.shape)} "
            f"and group size {group}, got {tuple(scale.shape)}"
        )


def _cut_quantized(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    dtype: torch.dtype,
    group_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `_cut_tables` makes, each followed by its scales, `[E, I'/64, G, 2, 64]` and
    `[E, H'/64, G, 64]`; G is 1 without a group size."""
    gate_up, down = _cut_tables(w13, w2, dtype)
    _check_scale("w13", w13, w13_scale, group_size)
    _check_scale("w2", w2, w2_scale, group_size)
    inner_up, hidden_up = gate_up.shape[1] * ROWS, down.shape[1] * ROWS
    groups = (1, 1) if group_size is None else (hidden_up // group_size, inner_up // group_size)
    gate_up_scale = _cut_scale_blocks(w13_scale.unflatten(1, (2, -1)), inner_up, groups[0])
    down_scale = _cut_scale_blocks(w2_scale, hidden_up, groups[1])
    return gate_up, gate_up_scale.permute(0, 2, 3, 1, 4).contiguous(), down, down_scale


def prepack_experts(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reorders the experts' weights of a bundle for the kernels of `moe_w4a8` and `moe_w4a16`.

    Experts are independent: slices of the tables may be packed one after the other and
    concatenated along the first dimension.

    Args:
        w13, w13_scale, w2, w2_scale, group_size: as in `et_moe.backends.ops.moe_w4a8`.

    Returns:
        With H' = H and I' = I rounded up to multiples of 128:
        w13 `uint8 [E, I'/64, H'/128, 2, 64, 64]` (gate, up), and its scales
        `[E, I'/64, H'/group_size, 2, 64]`;
        w2 `uint8 [E, H'/64, I'/128, 64, 64]`, and its scales `[E, H'/64, I'/group_size, 64]`.
        Scales keep their dtype, bfloat16 or float16.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    tables = (w13, w13_scale, w2, w2_scale)
    gate_up, gate_up_scale, down, down_scale = _cut_quantized(*tables, torch.uint8, group_size)
    return pack_nibbles(gate_up), gate_up_scale, pack_nibbles(down), down_scale


def prepack_experts_w8(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`prepack_experts` for `moe_w8a8` and `moe_w8a16`, with their arguments.

    Returns:
        w13 `int8 [E, I'/64, H'/128, 2, 64, 128]` and its scales `bfloat16 [E, I'/64, 1, 2, 64]`;
        w2 `int8 [E, H'/64, I'/128, 64, 128]` and its scales `bfloat16 [E, H'/64, 1, 64]`.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    tables = (w13, w13_scale, w2, w2_scale)
    gate_up, gate_up_scale, down, down_scale = _cut_quantized(*tables, torch.int8, None)
    return gate_up.contiguous(), gate_up_scale, down.contiguous(), down_scale


def prepack_experts_dense(w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`prepack_experts` for `moe`, with its arguments.

    Returns:
        w13 `[E, I'/64, H'/128, 2, 64, 128]` and w2 `[E, H'/64, I'/128, 64, 128]` in their dtype,
        bfloat16 or float32.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    gate_up, down = _cut_tables(w13, w2, torch.bfloat16, torch.float32)
    return gate_up.contiguous(), down.contiguous()


def find_bits(prepacked: torch.Tensor) -> int:
    """The bits of a weight, of a table as the functions here make it."""
    return 4 if prepacked.dtype == torch.uint8 else 8 * prepacked.itemsize


def name_tables(prepacked: torch.Tensor, int8: bool) -> str:
    """What the names of the tuning tables for a prepacked table begin with; int8: activations."""
    if prepacked.is_floating_point():
        return "moe_dense"
    return f"moe_w{find_bits(prepacked)}a{8 if int8 else 16}"


@triton.constexpr_function
def count_scales(tiles: int, group: int | None, bits: int) -> int:
    """How many scales there are for a row of `tiles` blocks, for the kernels' GROUP and BITS."""
    if bits == 4:
        return tiles * (128 // group)
    return 1 if bits == 8 else 0
