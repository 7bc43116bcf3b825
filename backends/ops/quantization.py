"""INT4 weights and INT8 activations: formats, and how numbers get into them."""

import functools

import torch

from et_moe.backends.ops.library import declare

ACTIVATION_TILE = 128
"""Columns that share one INT8 activation scale in front of a GEMM over the hidden dimension."""


def expert_activation_tile(inner: int) -> int:
    """The same between the two GEMMs of experts of width `inner`.

    With Gaussian inputs, tiles 128/64 cost 1.47% relative L2 error against bf16 activations and
    128/128 would cost 1.65%, over the budget of 1.5%. Narrow experts have so few weights that the
    error scatters: at (32 tokens, 128, 64, 8 experts) one draw in five lies above 1.5%. There 32
    gives 1.32%, no draw of 200 above 1.45%, and costs no time that matters.
    """
    return 32 if inner <= 128 else 64


GROUP_SIZES = (32, 64, 128)

SCALE_DTYPES = (torch.bfloat16, torch.float16)
"""Of INT4 weights. What this project quantizes has bfloat16; checkpoints that arrive quantized may
have float16, which keep their values."""


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Packs -8..7 `[..., K]` to `uint8 [..., K/2]`: value + 8, even k in the low nibble."""
    pairs = (values + 8).to(torch.uint8).contiguous().view(torch.int16)
    # The even value is the lower byte; what is above the lowest byte is cut off.
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_int4`: `uint8 [..., K/2]` to `int8 [..., K]`."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return nibbles.to(torch.int8) - 8


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for a scale so small (or 0) that its inverse would be infinite."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0.0, 1.0 / scale)


def check_finite(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest entry along the last dimension, which they keep as one.

    Raises:
        ValueError: an entry is not finite, which shows in these.
    """
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the weight has entries that are not finite")
    return low, high


def sum_groups(values: torch.Tensor) -> torch.Tensor:
    """The sum of each group, float32 `[..., G, 1]` of `[..., G, group size]`, in one order.

    Torch sums on a CPU with AVX2 in this order. Elsewhere it is written out, so that a weight is
    quantized to the same bits on every device: four rows of eight columns each are added up in
    turns, then these four, then the eight columns.
    """
    if values.device.type == "cpu":
        return values.sum(-1, keepdim=True)
    return sum_groups_in_order(values)


def sum_groups_in_order(values: torch.Tensor) -> torch.Tensor:
    """`sum_groups`, one addition after the other."""
    total = values.unflatten(-1, (-1, 4, 8))
    for dim in (-3, -2, -1):
        first, *others = total.unbind(dim)
        for other in others:
            first = first + other
        total = first
    return total.unsqueeze(-1)


def _divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """The quotient, rounded once: by a number, CUDA multiplies with its reciprocal."""
    return values / torch.tensor(divisor, dtype=values.dtype, device=values.device)


def _round_to_scale(
    groups: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.mul(groups, _inverse(scale), out=out).round_().clamp_(-8, 7)


def _weigh(values: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """`values`, which may be overwritten, each times the importance of its column."""
    return values if importance is None else values.mul_(importance)


def _squared_error(
    groups: torch.Tensor,
    scale: torch.Tensor,
    importance: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    residual = _round_to_scale(groups, scale, out).mul_(scale).sub_(groups)
    return sum_groups(_weigh(residual.square_(), importance))


def _minmax_scale(
    groups: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    return _divide(torch.maximum(low.abs(), high.abs()), 7).to(dtype).float()


def _refined_scale(
    groups: torch.Tensor,
    q: torch.Tensor,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
    product: torch.Tensor,
) -> torch.Tensor:
    """The best scale for fixed integers q, which are overwritten: sum(w q) / sum(q q)."""
    sum_wq = sum_groups(_weigh(torch.mul(groups, q, out=product), importance))
    norm = sum_groups(_weigh(q.square_(), importance))
    return torch.where(norm > 0, sum_wq / norm, 0.0).to(dtype).float()


def _best_scale(
    groups: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
    divisors: tuple[float, ...],
    rounds: int,
) -> torch.Tensor:
    """The candidate with the least squared error per group, columns weighed by importance.

    Candidates are the min-max scale, and the entry of largest magnitude over each of the divisors:
    -8 puts it on the longer side of the INT4 range (the scale may be negative for that), 7 on the
    shorter one, larger ones clip it. These are refined in so many rounds, see `_refined_scale`.
    """
    extreme = torch.where(high > -low, high, low)
    q, product = torch.empty_like(groups), torch.empty_like(groups)
    best_scale = _minmax_scale(groups, low, high, dtype, importance)
    best_error = _squared_error(groups, best_scale, importance, q)
    for divisor in divisors:
        scale = _divide(extreme, divisor)
        for _ in range(rounds):
            _round_to_scale(groups, scale, q)
            scale = _refined_scale(groups, q, dtype, importance, product)
        error = _squared_error(groups, scale, importance, q)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


_SEARCHED = (-7.2, -8.0, -8.8, -9.8, -11.0, 6.3, 7.0, 7.7, 8.6, 9.6)
"""Divisors of "search": weighed by importance, an entry of large magnitude may not matter."""

SCALE_METHODS = {
    "mse": functools.partial(_best_scale, divisors=(-8.0, -8.8, -9.8, 7.0), rounds=1),
    "search": functools.partial(_best_scale, divisors=_SEARCHED, rounds=2),
    "minmax": _minmax_scale,
}


def _relative(importance: torch.Tensor) -> torch.Tensor:
    """Importance as shares of each group's largest: errors of any size stay in fp32's range.

    Raises:
        ValueError: an entry is negative or not finite.
    """
    low, high = importance.amin(-1, keepdim=True), importance.amax(-1, keepdim=True)
    if not ((low >= 0).all() and torch.isfinite(high).all()):
        raise ValueError("importance has entries that are negative or not finite")
    return torch.where(high > 0, importance / high, 1.0)


def quantize_w4(
    weight: torch.Tensor,
    group_size: int,
    method: str = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a weight to symmetric group-wise INT4, the format of a bundle.

    Args:
        weight: float `[..., N, K]`.
        group_size: 32, 64 or 128 consecutive k that share a scale; divides K.
        method: "mse" chooses scales that minimise the squared error, "search" does so among more
            candidates, "minmax" takes max|w| / 7.
        scale_dtype: one of `SCALE_DTYPES`.
        importance: float `[..., K]`, not negative, broadcast over the rows: what the squared error
            of a column counts, such as the mean square of the input that it meets; or None for
            the same everywhere.

    Returns:
        packed `uint8 [..., N, K/2]` (see `pack_int4`) and scale `[..., N, K/group_size]`; the
        weight is approximately (nibble - 8) * scale. A scale may be negative.

    Raises:
        ValueError: a group size that is not supported or does not divide K; weights that are not
            finite, or too large for the scales' dtype; importance that is negative or not finite.
    """
    k = weight.shape[-1]
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group size {group_size} is not supported: expected one of {GROUP_SIZES}")
    if k % group_size:
        raise ValueError(f"group size {group_size} does not divide the input dimension {k}")
    if method not in SCALE_METHODS:
        raise ValueError(f"scale method {method!r}: expected one of {sorted(SCALE_METHODS)}")
    groups = weight.float().unflatten(-1, (-1, group_size))
    if importance is not None:
        importance = _relative(importance.float().unflatten(-1, (-1, group_size)))
    scale = SCALE_METHODS[method](groups, *check_finite(groups), scale_dtype, importance)
    if not torch.isfinite(scale).all():
        raise ValueError(f"the weight is too large for scales in {scale_dtype}")
    packed = pack_int4(_round_to_scale(groups, scale).to(torch.int8).flatten(-2))
    return packed, scale.squeeze(-1).to(scale_dtype)


def dequantize_w4(packed: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """Inverse of `quantize_w4` up to rounding: `float32 [..., N, K]`."""
    values = unpack_int4(packed).float().unflatten(-1, (-1, group_size))
    return (values * scale.float().unsqueeze(-1)).flatten(-2)


def quantize_w8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes `[..., N, K]` to INT8 with one scale per row: `int8 [..., N, K]` and
    `bfloat16 [..., N, 1]`.

    Raises:
        ValueError: non-finite weights.
    """
    rows = weight.float()
    low, high = check_finite(rows)
    scale = _divide(torch.maximum(low.abs(), high.abs()), 127).bfloat16()
    values = (rows * _inverse(scale.float())).round_().clamp_(-127, 127)
    return values.to(torch.int8), scale


def dequantize_w8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize_w8` up to rounding: `float32 [..., N, K]`."""
    return weight.float() * scale.float()


def _quantize_int8_fake(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    scales = x.new_empty((rows, (columns + tile - 1) // tile), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), scales


@declare(_quantize_int8_fake)
def quantize_int8(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 activations, one scale per row and tile of columns.

    Args:
        x: float `[M, K]`.
        tile: columns per scale; the last tile may be shorter.

    Returns:
        q `int8 [M, K]` = round_half_even(x * (127 / amax)) and scale `float32 [M, ceil(K/tile)]`
        = amax / 127, with amax the tile's largest magnitude. A tile whose amax is below 1e-30 is
        taken as zero (q = 0, scale = 0): 127 / amax must stay finite.
    """
    rows, columns = x.shape
    padding = -columns % tile
    tiles = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(-1, (-1, tile))
    amax = tiles.abs().amax(-1, keepdim=True)
    zero = amax < 1e-30
    inverse = torch.where(zero, 0.0, 127.0 / amax.masked_fill(zero, 1.0))
    q = (tiles * inverse).round_().to(torch.int8).flatten(-2)[:, :columns].contiguous()
    scale = torch.where(zero, 0.0, amax / 127.0).squeeze(-1)
    return q, scale.reshape(rows, (columns + tile - 1) // tile)


def _silu_quantize_int8_fake(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_int8_fake(x.narrow(1, 0, x.shape[1] // 2), tile)


@declare(_silu_quantize_int8_fake)
def silu_quantize_int8(x: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_int8(silu(gate) * up, tile)` for `x = [gate | up]`, float `[M, 2I]`."""
    gate, up = x.float().chunk(2, dim=-1)
    return quantize_int8(torch.nn.functional.silu(gate) * up, tile)


def matmul_w4a8(
    q: torch.Tensor,
    scale: torch.Tensor,
    tile: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """The arithmetic that every W4A8 kernel implements: `float32 [M, N]`.

    sum over tiles and groups of scale[m, tile] * weight_scale[n, group] * (an integer dot product).
    The integer sums over min(tile, group_size) products fit fp32 exactly, so this is the int32
    result; the order of the fp32 additions is left to the kernel.

    Args:
        q, scale, tile: as from `quantize_int8`: `int8 [M, K]`, `float32 [M, ceil(K/tile)]`.
        weight, weight_scale, group_size: as from `quantize_w4`, `uint8 [N, K/2]` and
            `[N, K/group_size]`.
    """
    step = min(tile, group_size)
    a = q.float().unflatten(-1, (-1, step))
    w = unpack_int4(weight).float().unflatten(-1, (-1, step))
    out = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.float32, device=q.device)
    for i in range(a.shape[1]):
        k = i * step
        scales = scale[:, k // tile, None] * weight_scale[:, k // group_size].float()
        out += (a[:, i] @ w[:, i].T) * scales
    return out


def matmul_w8a8(
    q: torch.Tensor,
    scale: torch.Tensor,
    tile: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    """The arithmetic that every W8A8 kernel implements: `float32 [M, N]`.

    weight_scale[n] * (sum over tiles of scale[m, tile] * an integer dot product). The integer sums
    over a tile fit fp32 exactly; the order of the fp32 operations is left to the kernel.

    Args:
        q, scale, tile: as from `quantize_int8`, tile at most 1024: `int8 [M, K]`,
            `float32 [M, ceil(K/tile)]`.
        weight, weight_scale: as from `quantize_w8`, `int8 [N, K]` and `[N, 1]`.
    """
    out = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.float32, device=q.device)
    columns = zip(q.float().split(tile, 1), weight.float().split(tile, 1), strict=True)
    for i, (a, w) in enumerate(columns):
        out += (a @ w.T) * scale[:, i, None]
    return out * weight_scale.float().T
