"""The order in which the MoE kernels want INT4 expert weights: a format of its own, versioned.

A weight `[N, K]` is cut into blocks of 64 rows by 128 columns, padded with zeros. A block is 4 KB
of 64 rows by 64 bytes: byte j has column j in its low and column j + 64 in its high nibble, so both
nibbles of a run of bytes are the plain operand of a dot product. Nibbles are two's complement
(`int4` says why). All column blocks of a row block follow each other: a thread block streams
contiguous memory.
"""

import torch

from et_moe.backends.threads import worker_threads

PREPACK_VERSION = 1
"""Changes whenever the layout of `prepack_experts` does; files of prepacked weights record it."""

ROWS = 64
COLUMNS = 128
ZERO_BYTE = 0x88
"""Two weights of zero in a bundle."""

_PIECE = 1 << 20
"""Bytes packed at a time: their temporaries stay in the cache."""


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pack_piece(halves: torch.Tensor, out: torch.Tensor) -> None:
    # Byte i of a half has columns that become the same nibble of bytes 2i and 2i + 1 of the run:
    # of one little-endian word.
    words = halves.to(torch.int16, memory_format=torch.contiguous_format)
    words |= words << 4
    words &= 0x0F0F
    packed = torch.add(words[0], words[1], alpha=16, out=out.view(torch.int16))
    # A zero of the bundle is nibble 8; flipping the top bit makes two's complement of it.
    packed ^= 0x8888 - (1 << 16)


def pack_nibbles(runs: torch.Tensor) -> torch.Tensor:
    """Reorders the columns of an INT4 weight of a bundle within runs of bytes.

    Args:
        runs: `uint8 [N, ..., B]` with any strides; byte i of a run has column 2i in its low and
            column 2i + 1 in its high nibble, as value + 8.

    Returns:
        `uint8 [N, ..., B]`, contiguous; byte j of a run has column j in its low and column j + B
        in its high nibble, in two's complement.
    """
    out = torch.empty(runs.shape, dtype=torch.uint8, device=runs.device)
    if runs.is_meta:
        return out
    rows = max(1, _PIECE * len(runs) // max(1, runs.numel()))
    halves = runs.unflatten(-1, (2, -1)).movedim(-2, 0)
    with worker_threads() as pool:
        list(pool.map(_pack_piece, halves.split(rows, dim=1), out.split(rows)))
    return out


def _pad(x: torch.Tensor, rows: int, columns: int, value: int = 0) -> torch.Tensor:
    """Pads the last two dimensions with `value`."""
    if x.shape[-2:] == (rows, columns):
        return x
    out = x.new_full((*x.shape[:-2], rows, columns), value)
    out[..., : x.shape[-2], : x.shape[-1]] = x
    return out


def _blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`uint8 [..., N, K/2]` of a bundle as `uint8 [..., rows/64, columns/128, 64, 64]`, a view."""
    padded = _pad(weight, rows, columns // 2, ZERO_BYTE)
    return padded.unflatten(-1, (-1, COLUMNS // 2)).unflatten(-3, (-1, ROWS)).transpose(-3, -2)


def _scale_blocks(scale: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """`[..., N, G]` to `bfloat16 [..., rows/64, groups, 64]`."""
    padded = _pad(scale.bfloat16(), rows, groups)
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
    """Reorders the experts' weights for `moe_w4a8` and `moe_w4a16` of this folder.

    Experts are independent: slices of the tables may be packed one after the other and
    concatenated along the first dimension.

    Args:
        w13, w13_scale, w2, w2_scale, group_size: as in `et_moe.backends.ops.moe_w4a8`.

    Returns:
        With H' = H and I' = I rounded up to multiples of 128:
        w13 `uint8 [E, I'/64, H'/128, 2, 64, 64]` (gate, up), and its scales
        `bfloat16 [E, I'/64, H'/group_size, 2, 64]`;
        w2 `uint8 [E, H'/64, I'/128, 64, 64]`, and its scales
        `bfloat16 [E, H'/64, I'/group_size, 64]`.

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
    hidden_up, inner_up = _ceil(hidden, COLUMNS), _ceil(inner, COLUMNS)
    gate_up = _blocks(w13.unflatten(1, (2, -1)), inner_up, hidden_up)
    gate_up_scale = _scale_blocks(
        w13_scale.unflatten(1, (2, -1)), inner_up, hidden_up // group_size
    )
    return (
        pack_nibbles(gate_up.permute(0, 2, 3, 1, 4, 5)),
        gate_up_scale.permute(0, 2, 3, 1, 4).contiguous(),
        pack_nibbles(_blocks(w2, hidden_up, inner_up)),
        _scale_blocks(w2_scale, hidden_up, inner_up // group_size),
    )
