"""The layouts of prepacked weights, and what `prepack_experts` refuses."""

import hashlib

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.common import int4_packing
from et_moe.backends.cuda.triton.linear import layout as linear
from et_moe.backends.cuda.triton.moe import layout as moe
from et_moe.backends.cuda.triton.moe.layout import prepack_experts

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
