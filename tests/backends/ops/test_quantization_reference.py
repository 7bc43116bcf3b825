"""INT4 and INT8 formats: round trips, error bounds, and the corners of the number range."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from et_moe.backends import ops
from et_moe.backends.ops.quantization import (
    matmul_w4a8,
    matmul_w8a8,
    sum_groups,
    sum_groups_in_order,
)

ROWS = 2000
GROUPS = pytest.mark.parametrize("group_size", ops.GROUP_SIZES)
METHODS = pytest.mark.parametrize("method", ["mse", "minmax", "search"])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(k: int) -> Iterator[tuple[str, Tensor]]:
    """Weights `[ROWS, k]` of many kinds."""
    generator = rng(k)
    normal = torch.randn(ROWS, k, generator=generator)
    uniform = torch.rand(ROWS, k, generator=generator)
    outlier = normal.clone()
    outlier[:, 3] = 30
    yield "normal", normal
    yield "trained", (normal * 0.02).bfloat16().float()
    yield "heavy tails", normal**5
    yield "uniform", uniform * 2 - 1
    yield "positive", normal.abs()
    yield "negative", -normal.abs()
    yield "one outlier", outlier
    yield "sparse", normal * (uniform < 0.1)
    yield "two values", torch.where(uniform < 0.5, 1.0, -0.9)
    yield "integers", torch.randint(-9, 10, (ROWS, k), generator=generator).float()
    yield "one entry", torch.zeros(ROWS, k).index_fill(1, torch.tensor([5]), -0.37)


def squared_errors(weight: Tensor, group_size: int, method: str) -> Tensor:
    """The squared error of each group, computed in double precision."""
    packed, scale = ops.quantize_w4(weight, group_size, method)
    error = ops.dequantize_w4(packed, scale, group_size).double() - weight.double()
    return error.square().unflatten(-1, (-1, group_size)).sum(-1)


def test_pack_and_unpack() -> None:
    """Every byte survives, and the layout is value + 8, with even columns in the low nibble."""
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(ops.pack_int4(ops.unpack_int4(every)), every)
    values = torch.randint(-8, 8, (3, 5, 64), generator=rng(), dtype=torch.int8)
    packed = ops.pack_int4(values)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 32)
    assert torch.equal(ops.unpack_int4(packed), values)
    assert ops.pack_int4(torch.tensor([[-8, 7, 0, -1]])).tolist() == [[0xF0, 0x78]]


@GROUPS
@METHODS
def test_w4_shapes_and_leading_dimensions(group_size: int, method: str) -> None:
    """Rows are independent: a stack of experts is quantized as each row alone."""
    weight = torch.randn(3, 5, 256, generator=rng())
    packed, scale = ops.quantize_w4(weight, group_size, method)
    assert packed.shape == (3, 5, 128) and packed.dtype == torch.uint8
    assert scale.shape == (3, 5, 256 // group_size) and scale.dtype == torch.bfloat16
    row, row_scale = ops.quantize_w4(weight[1, 2][None], group_size, method)
    assert torch.equal(row[0], packed[1, 2]) and torch.equal(row_scale[0], scale[1, 2])


@GROUPS
def test_w4_mse_is_never_worse_than_minmax(group_size: int) -> None:
    for name, weight in distributions(group_size):
        mse = squared_errors(weight, group_size, "mse")
        minmax = squared_errors(weight, group_size, "minmax")
        assert (mse <= minmax * (1 + 1e-5)).all(), name  # errors are compared in fp32
        if name in ("normal", "trained"):
            assert mse.sum() < 0.75 * minmax.sum(), name


@GROUPS
def test_w4_mse_is_close_to_the_best_scale(group_size: int) -> None:
    """The errors are compared with those of an exhaustive search over 2000 scales per group."""
    weight = torch.randn(100, group_size, generator=rng(1))
    extreme = weight.abs().amax(-1, keepdim=True)
    best = torch.full((100, 1), float("inf"))
    for divisor in torch.linspace(5, 15, 1000).tolist():
        for scale in (extreme / divisor, -extreme / divisor):
            rounded = (weight / scale).round().clamp(-8, 7) * scale
            best = torch.minimum(best, (rounded - weight).square().sum(-1, keepdim=True))
    assert squared_errors(weight, group_size, "mse").sum() < 1.05 * best.sum()


@GROUPS
def test_w4_search_is_never_worse_than_mse(group_size: int) -> None:
    for name, weight in distributions(group_size):
        search = squared_errors(weight, group_size, "search")
        assert search.sum() <= squared_errors(weight, group_size, "mse").sum(), name


@GROUPS
@pytest.mark.parametrize("method", ["mse", "search"])
def test_w4_importance_lowers_the_weighed_error(group_size: int, method: str) -> None:
    """Columns that matter more come out closer, and each row may have an importance of its own."""
    weight = torch.randn(40, 2 * group_size, generator=rng(6))
    importance = torch.randn(40, 2 * group_size, generator=rng(7)).square() ** 2
    for given in (importance, importance[0]):
        errors = []
        for columns in (None, given):
            found = ops.quantize_w4(weight, group_size, method, importance=columns)
            left = ops.dequantize_w4(*found, group_size) - weight
            errors.append((left.square() * given).sum())
        assert errors[1] < 0.95 * errors[0]


def test_w4_importance_counts_relative_to_its_group() -> None:
    """The same everywhere is no importance, whatever its size, and so is none at all."""
    weight = torch.randn(20, 256, generator=rng(8))
    expected = ops.quantize_w4(weight, 128)
    for size in (1e-38, 3.0, 1e30, 0.0):
        packed, scale = ops.quantize_w4(weight, 128, importance=torch.full((256,), size))
        assert torch.equal(packed, expected[0]) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_importance_that_is_none(bad: float) -> None:
    importance = torch.ones(128)
    importance[5] = bad
    with pytest.raises(ValueError, match="importance has entries that are negative or not finite"):
        ops.quantize_w4(torch.ones(2, 128), 32, importance=importance)


@GROUPS
def test_w4_minmax_error_bound(group_size: int) -> None:
    """Errors are at most half a step, and what rounding the scale to bfloat16 costs the largest
    entry."""
    for name, weight in distributions(group_size):
        packed, scale = ops.quantize_w4(weight, group_size, "minmax")
        error = (ops.dequantize_w4(packed, scale, group_size) - weight).abs()
        bound = scale.float() * 0.5 + weight.abs().amax(-1, keepdim=True) * 2**-8
        assert (error <= bound * (1 + 1e-5)).all(), name


@GROUPS
@METHODS
def test_w4_is_exact_on_representable_weights(group_size: int, method: str) -> None:
    """Groups that reach the end of the range (7 for min-max, 7 or -8 otherwise) come back
    unchanged."""
    generator = rng(2)
    low, high = (-7, 8) if method == "minmax" else (-8, 8)
    values = torch.randint(low, high, (ROWS, group_size), generator=generator)
    values[:, 7] = 7 if method == "minmax" else torch.where(torch.arange(ROWS) % 2 == 0, 7, -8)
    if method != "minmax":  # 7 is the end of the range only where no -8 is larger in magnitude
        values[::2].clamp_(-7, 7)
    steps = torch.randint(128, 256, (ROWS, 1), generator=generator) / 128  # exact in bfloat16
    scale = steps * 2.0 ** torch.randint(-20, 5, (ROWS, 1), generator=generator)
    weight = values * scale
    packed, found = ops.quantize_w4(weight, group_size, method)
    assert torch.equal(ops.dequantize_w4(packed, found, group_size), weight)


@GROUPS
@METHODS
def test_w4_of_zeros(group_size: int, method: str) -> None:
    packed, scale = ops.quantize_w4(torch.zeros(2, 256), group_size, method)
    assert (packed == 0x88).all() and (scale == 0).all()
    one = torch.zeros(2, 256)
    one[0, 0] = 1.0  # the zero groups beside it stay zero
    dequantized = ops.dequantize_w4(*ops.quantize_w4(one, group_size, method), group_size)
    assert dequantized.count_nonzero() == 1
    assert dequantized[0, 0].item() == pytest.approx(1.0, rel=2**-8)


@METHODS
@pytest.mark.parametrize(
    "size", [1e-45, 1e-44, 1e-40, 3e-39, 1e-38, 1e-37, 1e-30, 1e30, 1e37, 1e38]
)
def test_w4_at_the_ends_of_the_number_range(method: str, size: float) -> None:
    weight = torch.randn(500, 128, generator=rng(3)).clamp(-3, 3) / 3 * size
    weight[::2, ::3] = 0
    packed, scale = ops.quantize_w4(weight, 32, method)
    dequantized = ops.dequantize_w4(packed, scale, 32)
    assert dequantized.isfinite().all()
    # Weights that are smaller than 1e-30 may vanish, but not grow.
    limit = 0.15 if size >= 1e-30 else 1.0
    groups = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
    assert ((dequantized - weight).abs().unflatten(-1, (-1, 32)) <= limit * groups).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = torch.ones(4, 128, dtype=torch.bfloat16)
    weight[3, 127] = bad
    with pytest.raises(ValueError, match="the weight has entries that are not finite"):
        ops.quantize_w4(weight, 128)
    with pytest.raises(ValueError, match="the weight has entries that are not finite"):
        ops.quantize_w8(weight)


def test_w4_arguments() -> None:
    weight = torch.ones(2, 192)
    for size in (0, 1, 16, 48, 256, -32):
        with pytest.raises(ValueError, match=f"group size {size} is not supported: expected one"):
            ops.quantize_w4(weight, size)
    with pytest.raises(ValueError, match="group size 128 does not divide the input dimension 192"):
        ops.quantize_w4(weight, 128)
    with pytest.raises(
        ValueError, match=r"scale method 'max': expected one of \['minmax', 'mse', 'search'\]"
    ):
        ops.quantize_w4(weight, 64, "max")


@GROUPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_w4(group_size: int, dtype: torch.dtype) -> None:
    """A row is that of the whole table; small scales, which float16 has as subnormal, stay."""
    table = torch.randn(30, 256, generator=rng(4)) * torch.logspace(-7, 1, 30)[:, None]
    ids = torch.tensor([29, 0, 7, 29])
    for scale_dtype in ops.SCALE_DTYPES:
        weight, scale = ops.quantize_w4(table, group_size, scale_dtype=scale_dtype)
        rows = ops.embedding_w4(ids, weight, scale, group_size, dtype)
        whole = ops.dequantize_w4(weight, scale, group_size).to(dtype)
        assert rows.dtype == dtype and torch.equal(rows, whole[ids])
        fake = torch.ops.et_moe.embedding_w4(
            *(t.to("meta") for t in (ids, weight, scale)), group_size, dtype
        )
        assert (fake.shape, fake.dtype) == (rows.shape, rows.dtype)


def test_w8() -> None:
    """Errors are at most half a step of the row, also for rows of zeros and of denormals, and all
    values are from -127 to 127."""
    table = torch.randn(300, 64, generator=rng(4)) * torch.logspace(-30, 30, 300)[:, None]
    table[7], table[8] = 0, table[8] * 1e-45
    values, scale = ops.quantize_w8(table)
    assert values.dtype == torch.int8 and scale.dtype == torch.bfloat16
    assert scale.shape == (300, 1) and values.min() >= -127
    error = (values.float() * scale.float() - table).abs()
    amax = table.abs().amax(-1, keepdim=True)
    usual = torch.arange(300) != 8
    assert (error <= scale.float() * 0.5 + amax * 2**-8)[usual].all()
    assert (error[8] <= amax[8]).all() and (values[7] == 0).all() and scale[7] == 0
    ids = torch.tensor([3, 299, 3])
    assert torch.equal(
        ops.embedding_w8(ids, values, scale, torch.float32),
        values[ids].float() * scale[ids].float(),
    )


@pytest.mark.parametrize(
    ("columns", "tile"), [(128, 128), (130, 64), (5, 128), (64, 1), (192, 128)]
)
def test_int8(columns: int, tile: int) -> None:
    """Each tile, of which the last may be short, has the scale amax / 127. Errors are at most half
    a step."""
    x = torch.randn(50, columns, generator=rng(5)) * torch.logspace(-6, 6, 50)[:, None]
    x[3] = 0
    q, scale = ops.quantize_int8(x, tile)
    tiles = -(-columns // tile)
    assert q.dtype == torch.int8 and q.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (50, tiles)
    for t in range(tiles):
        part, values = x[:, t * tile : (t + 1) * tile], q[:, t * tile : (t + 1) * tile].float()
        amax = part.abs().amax(-1)
        assert torch.equal(scale[:, t], amax / 127)
        assert (values.abs().amax(-1)[amax > 0] == 127).all() and values.abs().max() <= 127
        error = (values * scale[:, t, None] - part).abs()
        assert (error <= scale[:, t, None] * 0.5001).all()
    assert (q[3] == 0).all() and (scale[3] == 0).all()


def test_int8_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale = ops.quantize_int8(x, 8)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_int8_takes_tiny_tiles_as_zero() -> None:
    """An amax below 1e-30 counts as zero. From there on 127 / amax is finite, and the tile is
    kept."""
    x = torch.tensor([[0.9e-30, 0.0], [1.1e-30, -1.1e-30], [1e-45, 0.0], [3e38, -3e38]])
    q, scale = ops.quantize_int8(x, 2)
    assert q.tolist() == [[0, 0], [127, -127], [0, 0], [127, -127]]
    assert (scale[[0, 2]] == 0).all() and (scale[[1, 3]] > 0).all() and scale.isfinite().all()


def test_int8_of_bfloat16_is_that_of_its_values() -> None:
    x = torch.randn(9, 200, generator=rng(6)).bfloat16()
    for actual, expected in zip(
        ops.quantize_int8(x, 128), ops.quantize_int8(x.float(), 128), strict=True
    ):
        assert torch.equal(actual, expected)


def test_silu_quantize_int8() -> None:
    x = torch.randn(9, 200, generator=rng(7))
    gate, up = x[:, :100], x[:, 100:]
    for actual, expected in zip(
        ops.silu_quantize_int8(x, 64),
        ops.quantize_int8(gate / (1 + (-gate).exp()) * up, 64),
        strict=True,
    ):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-5, atol=1.0)


@GROUPS
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_matmul_w4a8_is_the_product_of_the_dequantized(group_size: int, tile: int) -> None:
    weight = ops.quantize_w4(torch.randn(24, 256, generator=rng(8)), group_size)
    q, scale = ops.quantize_int8(torch.randn(7, 256, generator=rng(9)), tile)
    activations = q.double() * scale.double().repeat_interleave(tile, dim=1)
    expected = activations @ ops.dequantize_w4(*weight, group_size).double().T
    actual = matmul_w4a8(q, scale, tile, *weight, group_size).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [128, 200])
@pytest.mark.parametrize("tile", [32, 128])
def test_matmul_w8a8_is_the_product_of_the_dequantized(columns: int, tile: int) -> None:
    weight = ops.quantize_w8(torch.randn(24, columns, generator=rng(8)))
    q, scale = ops.quantize_int8(torch.randn(7, columns, generator=rng(9)), tile)
    activations = q.double() * scale.double().repeat_interleave(tile, dim=1)[:, :columns]
    expected = activations @ ops.dequantize_w8(*weight).double().T
    actual = matmul_w8a8(q, scale, tile, *weight).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@GROUPS
def test_groups_are_summed_in_the_order_that_is_written_out(group_size: int) -> None:
    """So a GPU, which sums in its own order, quantizes to the bits of a CPU."""
    for _, weight in distributions(4 * group_size):
        values = weight.unflatten(-1, (4, group_size))
        assert torch.equal(sum_groups_in_order(values), sum_groups(values))
    values = torch.randn(ROWS, 4, group_size, generator=rng())
    assert not torch.equal(values.flip(-1).sum(-1, keepdim=True), sum_groups(values))


@METHODS
def test_the_bits_do_not_depend_on_how_rows_are_shared_out(method: str) -> None:
    weight = torch.randn(3, 40, 256, generator=rng()).bfloat16()
    packed, scale = ops.quantize_w4(weight, 64, method)
    rows = [ops.quantize_w4(row, 64, method) for row in weight.flatten(0, 1).split(7)]
    assert torch.equal(torch.cat([r[0] for r in rows]), packed.flatten(0, 1))
    assert torch.equal(torch.cat([r[1] for r in rows]), scale.flatten(0, 1))
