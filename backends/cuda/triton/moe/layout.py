"""The order in which the kernels of the experts read INT4 weights, versioned.

A weight `[N, K]` is cut into blocks of 64 rows by 128 columns, padded with zeros. A block is 4 KB,
64 rows of 64 bytes. Byte j has column j in its low and column j + 64 in its high nibble, in two's
complement, so that both nibbles of a run of bytes are plain operands of a dot product
(`common/int4.py`). The blocks of the same rows follow each other, so that a thread block streams
contiguous memory.
"""

import torch

from et_moe.backends.cuda.triton.common.int4_packing import ZERO_BYTE, pack_nibbles

LAYOUT_VERSION = 1
"""Version of what `prepack_experts` makes; files of prepacked weights record it."""

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
    """`uint8 [..., N, K/2]` of a bundle as `uint8 [..., rows/64, columns/128, 64, 64]`, a view."""
    padded = _pad(weight, rows, columns // 2, ZERO_BYTE)
    return padded.unflatten(-1, (-1, COLUMNS // 2)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)


def _cut_scale_blocks(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """`[..., N, G]` to `[..., rows/64, groups, 64]`, float16 if it was, else bfloat16."""
    scale = scale if scale.dtype == torch.float16 else scale.bfloat16()
    padded = _pad(scale, rows, groups)
    return padded.unflatten(-2, (-1, ROWS)).transpose(-2, -1).contiguous()


def _check(name: str, weight: torch.Tensor, scale: torch.Tensor, group_size: int) -> None:
    if weight.dtype != torch.uint8 or weight.dim() != 3:
        raise ValueError(
            f"{name}: expected uint8 [E, N, K/2], got {weight.dtype} {tuple(weight.shape)}"
        )
    experts, rows, half = weight.shape
    expected = (experts, rows, 2 * half // group_size)
    if 2 * half % group_size or tuple(scale.shape) != expected:
        raise ValueError(
            f"{name}_scale: expected {expected} for {name} {tuple(weight.shape)} "
            f"and group size {group_size}, got {tuple(scale.shape)}"
        )


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
    _check("w13", w13, w13_scale, group_size)
    _check("w2", w2, w2_scale, group_size)
    experts, twice, half_hidden = w13.shape
    hidden, inner = 2 * half_hidden, twice // 2
    if tuple(w2.shape) != (experts, hidden, inner // 2):
        raise ValueError(
            f"w2: expected {(experts, hidden, inner // 2)} for w13 {tuple(w13.shape)}, "
            f"got {tuple(w2.shape)}"
        )
    hidden_up, inner_up = _round_up(hidden, COLUMNS), _round_up(inner, COLUMNS)
    gate_up = _cut_blocks(w13.unflatten(1, (2, -1)), inner_up, hidden_up)
    gate_up_scale = _cut_scale_blocks(
        w13_scale.unflatten(1, (2, -1)), inner_up, hidden_up // group_size
    )
    return (
        pack_nibbles(gate_up.permute(0, 2, 3, 1, 4, 5)),
        gate_up_scale.permute(0, 2, 3, 1, 4).contiguous(),
        pack_nibbles(_cut_blocks(w2, hidden_up, inner_up)),
        _cut_scale_blocks(w2_scale, hidden_up, inner_up // group_size),
    )
