"""A gated delta net of one token with its projection, against the ops' references and kernels."""

import itertools

import pytest
import torch
from test_gated_delta_net import (
    GROUP_3,
    SLOT,
    STATES,
    TOLERANCE,
    clone,
    net_inputs,
    relative_error,
)
from test_linear import weights

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.gated_delta_net import op as kernels
from et_moe.backends.cuda.triton.table import TRITON_OPS

PLANES = {"linear_w4a8": 1, "linear_w4a16": 2, "linear_w8a8": 1, "linear_w8a16": 2}
TAPS_2, TAPS_3 = (2, 1, 16, 32, 2), (1, 2, 16, 16, 3)


class Layer:
    """A random projection and the net behind it; each way to run them has states of its own."""

    def __init__(self, shape, op, k, group, dtype, device, norm=True) -> None:
        net = net_inputs(shape, 1, dtype, device)
        n = net.pop("projected").shape[1]
        self.bundle, self.packed = weights(op, n, k, group, device, size=k**-0.5)
        self.norm = torch.randn(k).to(device, dtype) if norm else None
        self.op, self.k = op, k
        self.fused, self.composed, self.reference = net, clone(net), clone(net)

    def run_fused(self, x: torch.Tensor) -> torch.Tensor:
        packed = (*self.packed, None)[:3]  # without a group size: INT8
        return kernels.gated_delta_net_projected(
            x, *packed, self.norm, 1e-5, PLANES[self.op], **self.fused, eps=1e-4
        )

    def run_composed(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the kernels of the two ops one after the other."""
        y = TRITON_OPS[self.op](x, *self.packed, self.norm, 1e-5)
        return kernels.gated_delta_net(y, **self.composed, eps=1e-4)

    def run_reference(self, x: torch.Tensor) -> torch.Tensor:
        y = getattr(ops, self.op)(x, *self.bundle, self.norm, 1e-5)
        return ops.gated_delta_net(y, **self.reference, eps=1e-4)


def check(layer: Layer, steps: int = 4) -> None:
    """Runs one token after the other and compares the results and the states that they leave."""
    weight = layer.fused["conv_weight"]
    dtype = weight.dtype
    tolerance = max(TOLERANCE[dtype], 1e-5 if PLANES[layer.op] == 1 else 7e-4)
    for _ in range(steps):
        x = torch.randn(1, layer.k).to(weight)
        got, expected = layer.run_fused(x), layer.run_reference(x)
        assert got.dtype == dtype and got.shape == expected.shape
        assert relative_error(got, expected) < tolerance
        # The convolution has the same instructions in both, so bits are the same on a GPU, too.
        assert torch.equal(got, layer.run_composed(x))
        for name in STATES:
            assert relative_error(layer.fused[name], layer.reference[name]) < tolerance, name
            assert torch.equal(layer.fused[name], layer.composed[name]), name


@pytest.mark.parametrize(
    "op,group",
    [*itertools.product(("linear_w4a8", "linear_w4a16"), ops.GROUP_SIZES), ("linear_w8a8", None)],
)
@pytest.mark.parametrize("shape", [GROUP_3, TAPS_2, TAPS_3])
def test_sizes(shape, group, op, device):
    """Neither the number of columns nor that of channels is a multiple of what a program
    computes."""
    check(Layer(shape, op, 256, group, torch.float32, device))


@pytest.mark.parametrize("op", PLANES)
@pytest.mark.parametrize("rows,span,repeat", [(16, 1, 1), (32, 2, 2), (32, 1, 4), (128, 4, 1)])
def test_several_blocks_per_program(rows, span, repeat, op, reconfigure, device):
    reconfigure("_gemv", BLOCK_ROWS=rows, SPAN=span, REPEAT=repeat, num_warps=4)
    check(Layer(GROUP_3, op, 512, 128, torch.float32, device, norm=False))


@pytest.mark.parametrize("op", PLANES)
def test_bf16(op, device):
    check(Layer(GROUP_3, op, 512, 64, torch.bfloat16, device))


@pytest.mark.parametrize("op", PLANES)
def test_repeatable_in_two_launches(op, device):
    layer = Layer(GROUP_3, op, 256, 32, torch.bfloat16, device)
    before, x = clone(layer.fused), torch.randn(1, 256).to(layer.norm)
    with record_launches(run=True) as launches:
        first = layer.run_fused(x)
    assert len(launches) == 2
    after, layer.fused = layer.fused, before
    assert torch.equal(first, layer.run_fused(x))
    for name in STATES:
        assert torch.equal(after[name], layer.fused[name])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_batch_behind_the_projection(dtype, device):
    """What is computed of the projection's result, in two launches for the single token and in two
    kernels for a batch, has the same bits. Under the interpreter, whose arithmetic is numpy's, this
    is only a hint that it holds on a GPU."""
    layer = Layer(GROUP_3, "linear_w4a8", 256, 128, dtype, device)
    x = torch.randn(3, 256).to(layer.norm)
    arguments = (*layer.packed, layer.norm, 1e-5)
    rows = [TRITON_OPS["linear_w4a8"](row[None], *arguments) for row in x]
    batch = layer.composed
    for name in STATES:
        batch[name] = batch[name][[SLOT] * 4].clone()
    batch["slots"] = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
    out = kernels.gated_delta_net(torch.cat(rows), **batch, eps=1e-4)
    before = clone(layer.fused)
    for b, slot in enumerate((3, 0, 2)):
        layer.fused = clone(before)
        assert torch.equal(layer.run_fused(x[b : b + 1])[0], out[b])
        for name in STATES:
            assert torch.equal(layer.fused[name][SLOT], batch[name][slot]), name


def test_wrong_arguments(device):
    layer = Layer(GROUP_3, "linear_w4a8", 256, 64, torch.float32, device)
    with pytest.raises(ValueError, match="x of 512 columns"):
        layer.run_fused(torch.randn(1, 512, device=device))
