"""CPU kernels of linear layers, the embedding and INT8 quantization against their references."""

import pytest
import torch
from op_harness import LINEAR_OPS, TOKENS, Harness, linear_weights, normal, quantized

from et_moe.backends import ops

SHAPES = ((96, 32), (192, 64), (256, 128), (160, 32))
"""Columns and group sizes, with tiles of 128 that are whole, short and followed by a short one."""


def _extremes(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of zeros, of denormals and of huge numbers, and one with magnitudes 30 decades apart."""
    x = normal(tokens, columns, dtype=dtype, seed=7)
    x[0] = 0.0
    x[1] *= 1e-39
    x[2] *= 1e18
    x[3, ::2] *= 1e-30
    return x


def test_linear(harness: Harness, dtype: torch.dtype) -> None:
    for columns in (40, 96):
        weight = normal(75, columns, dtype=dtype, seed=1)
        harness.compare(
            "linear", [[normal(t, columns, dtype=dtype, seed=t), weight] for t in TOKENS]
        )


def test_linear_with_weights_of_another_dtype(harness: Harness, dtype: torch.dtype) -> None:
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    args = [
        normal(3, 72, dtype=dtype, seed=1),
        normal(33, 72, dtype=other, seed=2),
        normal(72, dtype=other, seed=3),
        1e-5,
        normal(3, 33, dtype=other, seed=4),
    ]
    harness.compare("linear", [args])


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_norm_and_residual(harness: Harness, op: str, dtype: torch.dtype) -> None:
    columns = 192
    weight = normal(40, columns, dtype=dtype, seed=1)
    weights = linear_weights(op, weight)
    for norm, add in ((True, False), (False, True), (True, True)):
        calls = [
            [
                normal(t, columns, dtype=dtype, seed=t) * 3,
                *weights,
                normal(columns, dtype=dtype, seed=2) * 0.1 if norm else None,
                1e-6,
                normal(t, 40, dtype=dtype, seed=3) if add else None,
            ]
            for t in (1, 5, 17)
        ]
        harness.compare(op, calls)


@pytest.mark.parametrize("op", ["linear_w4a8", "linear_w4a16"])
@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_linear_int4(
    harness: Harness, op: str, columns: int, group: int, dtype: torch.dtype
) -> None:
    weights = [*quantized(normal(75, columns, seed=1), group), group]
    calls = [[normal(t, columns, dtype=dtype, seed=t), *weights] for t in TOKENS]
    harness.compare(op, [*calls, [_extremes(5, columns, dtype), *weights]])


@pytest.mark.parametrize("op", ["linear_w4a8", "linear_w4a16"])
@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_float16_scales(harness: Harness, op: str, columns: int, group: int) -> None:
    """One row of the weight has subnormal scales."""
    weight = normal(75, columns, seed=1)
    weight[3] *= 1e-6
    weights = [*quantized(weight, group, torch.float16), group]
    assert 0 < weights[1][3].abs().min() < torch.finfo(torch.float16).tiny
    harness.compare(op, [[normal(t, columns, seed=t), *weights] for t in TOKENS])


@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w8a16"])
@pytest.mark.parametrize("columns", [40, 96, 192, 256, 301])
def test_linear_int8(harness: Harness, op: str, columns: int, dtype: torch.dtype) -> None:
    """One row of the weight is zero, and one has a scale that is subnormal."""
    weight = normal(75, columns, seed=1)
    weight[2], weight[3] = 0.0, weight[3] * 1e-37
    weights = linear_weights(op, weight)
    assert 0 < weights[1][3] < torch.finfo(torch.bfloat16).tiny
    calls = [[normal(t, columns, dtype=dtype, seed=t), *weights] for t in TOKENS]
    harness.compare(op, [*calls, [_extremes(5, columns, dtype), *weights]])


@pytest.mark.parametrize("op", LINEAR_OPS[1:])
def test_linear_large_enough_for_threads(harness: Harness, op: str) -> None:
    weights = linear_weights(op, normal(2083, 512, seed=1), 128)
    harness.compare(op, [[normal(t, 512, seed=t), *weights] for t in (1, 67, 131)])


@pytest.mark.parametrize("op", ["quantize_int8", "silu_quantize_int8"])
def test_quantize(harness: Harness, op: str, dtype: torch.dtype) -> None:
    for columns, tile in ((192, 64), (200, 128), (30, 7), (40, 100)):
        width = columns * (2 if op.startswith("silu") else 1)
        calls = [[normal(t, width, dtype=dtype, seed=t), tile] for t in TOKENS]
        harness.compare(op, [*calls, [_extremes(5, width, dtype), tile]])


def test_quantize_rounds_half_to_even(harness: Harness) -> None:
    x = torch.cat((torch.tensor([127.0]), torch.arange(-126, 127) / 2))[None]
    harness.compare("quantize_int8", [[x, 512]])


def _same_rows(harness: Harness, op: str, *table) -> None:
    """The rows of a table of 50 have the reference's bits."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(50, (t,), generator=generator) for t in TOKENS] + [torch.tensor([0, 49])]
    calls = [[i, *table] for i in ids]
    for call, result in zip(calls, harness.run(op, calls)[0], strict=True):
        assert result.error == 0, harness.log
        assert torch.equal(result.tensors[0], getattr(ops, op)(*call))


def test_embedding(harness: Harness, dtype: torch.dtype) -> None:
    _same_rows(harness, "embedding_w8", *ops.quantize_w8(normal(50, 45, seed=1)), dtype)


@pytest.mark.parametrize("scale_dtype", ops.SCALE_DTYPES)
@pytest.mark.parametrize(("columns", "group"), SHAPES)
def test_embedding_int4(
    harness: Harness, columns: int, group: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """One row of the table is zero, and one has small scales, which are subnormal in float16."""
    table = normal(50, columns, seed=1)
    table[2], table[3] = 0.0, table[3] * 1e-6
    weights = quantized(table, group, scale_dtype)
    _same_rows(harness, "embedding_w4", *weights, group, dtype)


@pytest.mark.parametrize("bad", [50, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("op", ["embedding_w4", "embedding_w8"])
def test_embedding_refuses_tokens_outside_the_table(harness: Harness, op: str, bad: int) -> None:
    table = normal(50, 64, seed=1)
    weights = [*quantized(table, 32), 32] if op == "embedding_w4" else ops.quantize_w8(table)
    harness.refuse(
        op,
        [torch.tensor([3, bad]), *weights, torch.float32],
        f"et_moe::{op}: ids: token {bad} at 1 is outside 0..49",
    )


@pytest.mark.parametrize("op", ["linear_w4a8", "linear_w8a8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_stay_visible(harness: Harness, op: str, value: float) -> None:
    x = normal(2, 128, seed=1)
    x[1, 70] = value
    args = [x, *linear_weights(op, normal(8, 128, seed=2), 32)]
    result = harness.run(op, [args])[0][0]
    torch.testing.assert_close(result.tensors[0][0], getattr(ops, op)(*args)[0])
    assert not result.tensors[0][1].isfinite().any()
