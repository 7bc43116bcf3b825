"""The layouts of prepacked weights, and what `prepack_experts` refuses."""

import hashlib

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.common import int4_packing
from et_moe.backends.cuda.triton.linear import layout as linear
from et_moe.backends.cuda.triton.moe import layout as moe
from et_moe.backends.cuda.triton.moe.layout import (
    prepack_experts,
    prepack_experts_dense,
    prepack_experts_w8,
)

SHAPES = [(3, 256, 128, 128), (2, 64, 32, 32), (2, 320, 192, 64), (1, 96, 160, 32)]


def experts(count: int, hidden: int, inner: int, group: int):
    w13 = ops.quantize_w4(torch.randn(count, 2 * inner, hidden), group, "minmax")
    w2 = ops.quantize_w4(torch.randn(count, hidden, inner), group, "minmax")
    return *w13, *w2


def dequantize(packed: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """`[..., N', K']` from blocks `[..., N'/64, K'/128, 64, 64]`, read byte by byte."""
    low = ((packed & 0xF) ^ 8).int() - 8
    high = ((packed >> 4) ^ 8).int() - 8
    values = torch.cat((low, high), dim=-1)  # columns j, and columns j + 64
    rows = values.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    scales = scale.transpose(-2, -1).flatten(-3, -2).float()
    return rows.float() * scales.repeat_interleave(group, dim=-1)


@pytest.mark.parametrize("count,hidden,inner,group", SHAPES)
@pytest.mark.parametrize("dtype", ops.SCALE_DTYPES)
def test_layout(count, hidden, inner, group, dtype):
    weights = [
        t if t.dtype == torch.uint8 else (1.01 * t.float()).to(dtype)
        for t in experts(count, hidden, inner, group)
    ]
    w13, w13_scale, w2, w2_scale = prepack_experts(*weights, group)
    hidden_up, inner_up = -(-hidden // 128) * 128, -(-inner // 128) * 128
    assert w13.shape == (count, inner_up // 64, hidden_up // 128, 2, 64, 64)
    assert w2.shape == (count, hidden_up // 64, inner_up // 128, 64, 64)
    assert all(t.is_contiguous() for t in (w13, w13_scale, w2, w2_scale))
    assert (w13.dtype, w13_scale.dtype) == (torch.uint8, dtype)

    expected = ops.dequantize_w4(weights[0], weights[1], group).unflatten(1, (2, inner))
    for half in range(2):
        got = dequantize(w13[:, :, :, half], w13_scale[:, :, :, half], group)
        assert torch.equal(got[:, :inner, :hidden], expected[:, half])
        assert not got[:, inner:].any() and not got[:, :, hidden:].any()
    got = dequantize(w2, w2_scale, group)
    assert torch.equal(got[:, :hidden, :inner], ops.dequantize_w4(weights[2], weights[3], group))
    assert not got[:, hidden:].any() and not got[:, :, inner:].any()


def rows_of(blocks: torch.Tensor) -> torch.Tensor:
    """`[..., N', K']` from blocks `[..., N'/64, K'/128, 64, 128]`."""
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


@pytest.mark.parametrize("count,hidden,inner", [(3, 256, 128), (2, 75, 37), (1, 320, 192)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_layout_of_numbers(count, hidden, inner, dtype):
    """INT8 and float weights."""
    tables = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    if dtype == torch.int8:
        (w13, w13_scale), (w2, w2_scale) = (ops.quantize_w8(table) for table in tables)
        packed, up_scale, down, down_scale = prepack_experts_w8(w13, w13_scale, w2, w2_scale)
        scales = up_scale.transpose(2, 3).flatten(3).transpose(1, 2).flatten(2)
        assert torch.equal(scales[:, :, :inner], w13_scale.reshape(count, 2, inner))
        assert torch.equal(down_scale.flatten(1)[:, :hidden], w2_scale.squeeze(-1))
    else:
        w13, w2 = (table.to(dtype) for table in tables)
        packed, down = prepack_experts_dense(w13, w2)
    hidden_up, inner_up = -(-hidden // 128) * 128, -(-inner // 128) * 128
    assert packed.shape == (count, inner_up // 64, hidden_up // 128, 2, 64, 128)
    assert packed.is_contiguous() and down.is_contiguous() and packed.dtype == dtype
    for half, expected in enumerate(w13.chunk(2, dim=1)):
        got = rows_of(packed[:, :, :, half])
        assert torch.equal(got[:, :inner, :hidden], expected)
        assert not got[:, inner:].any() and not got[:, :, hidden:].any()
    assert torch.equal(rows_of(down)[:, :hidden, :inner], w2)
    assert not rows_of(down)[:, hidden:].any() and not rows_of(down)[:, :, inner:].any()


def test_experts_are_independent():
    weights = experts(3, 256, 128, 128)
    whole = prepack_experts(*weights, 128)
    slices = [prepack_experts(*(w[i : i + 1] for w in weights), 128) for i in range(3)]
    for tensor, parts in zip(whole, zip(*slices, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(parts))


def test_pieces_make_up_the_whole(monkeypatch):
    weights = experts(5, 256, 128, 128)
    whole = prepack_experts(*weights, 128)
    monkeypatch.setattr(int4_packing, "_PIECE", 2 * weights[0][0].numel())
    for tensor, expected in zip(prepack_experts(*weights, 128), whole, strict=True):
        assert torch.equal(tensor, expected)


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def counting(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    numbers = torch.arange(torch.Size(shape).numel()) * 37 % 251
    return numbers.reshape(shape).to(dtype)


def test_a_version_names_one_layout():
    """Whoever changes a layout gives it a new version; files of the old one are refused then."""
    scale = torch.bfloat16
    experts = prepack_experts(
        counting(2, 384, 96),
        counting(2, 384, 3, dtype=scale),
        counting(2, 192, 96),
        counting(2, 192, 3, dtype=scale),
        64,
    )
    assert (moe.LAYOUT_VERSION, digest(*experts)) == (1, "b95060e3de49250c")
    scales = counting(2, 384, 1, dtype=scale), counting(2, 192, 1, dtype=scale)
    numbers = counting(2, 384, 192, dtype=torch.int8), counting(2, 192, 192, dtype=torch.int8)
    int8 = prepack_experts_w8(numbers[0], scales[0], numbers[1], scales[1])
    dense = prepack_experts_dense(*(n.bfloat16() for n in numbers))
    assert (moe.LAYOUT_VERSION, digest(*int8), digest(*dense)) == (
        1,
        "c2f85f0f038cad07",
        "1939b324d84633f0",
    )
    layer = linear.prepack_linear(counting(6, 144), counting(6, 9, dtype=scale), 32)
    assert (linear.LAYOUT_VERSION, digest(*layer)) == (2, "4911c5c0d4290002")


@pytest.mark.parametrize(
    "index,change,message",
    [
        (0, lambda w: w.int(), "w13: expected uint8"),
        (1, lambda w: w[:, :-1], "w13_scale: expected"),
        (2, lambda w: w[:, :-64], "w2"),
        (3, lambda w: w[..., :0], "w2_scale: expected"),
    ],
)
def test_shapes_that_do_not_belong_together(index, change, message):
    weights = list(experts(2, 256, 128, 128))
    weights[index] = change(weights[index])
    with pytest.raises(ValueError, match=message):
        prepack_experts(*weights, 128)


@pytest.mark.parametrize(
    "index,change,message",
    [
        (0, lambda w: w.int(), "w13: expected int8"),
        (1, lambda w: w.expand(-1, -1, 2), "w13_scale: expected"),
        (2, lambda w: w[:, :, :-1], "w2: expected"),
        (2, lambda w: w.float(), "w2: expected int8"),
        (3, lambda w: w[:, :-1], "w2_scale: expected"),
    ],
)
def test_int8_shapes_that_do_not_belong_together(index, change, message):
    tables = torch.randn(2, 64, 75), torch.randn(2, 75, 32)
    weights = [part for table in tables for part in ops.quantize_w8(table)]
    weights[index] = change(weights[index])
    with pytest.raises(ValueError, match=message):
        prepack_experts_w8(*weights)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w13, w2: (w13.half(), w2), "w13: expected bfloat16 or float32"),
        (lambda w13, w2: (w13, w2.bfloat16()), "w2: expected"),
        (lambda w13, w2: (w13, w2[:1]), "w2: expected"),
    ],
)
def test_dense_shapes_that_do_not_belong_together(change, message):
    weights = change(torch.randn(2, 64, 75), torch.randn(2, 75, 32))
    with pytest.raises(ValueError, match=message):
        prepack_experts_dense(*weights)
