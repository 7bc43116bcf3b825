"""Kernels of the experts for 5 to 16 tokens, whose activations are quantized ahead."""

import pytest
import torch
from expert_tables import TOLERANCE, Experts, int8_or_dense, relative_error

from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.moe.decode import moe_decode

NAMES = ["moe_w4a8", "moe_w8a8"]


def experts_of(name, count, hidden, inner, device, group=64):
    if name == "moe_w4a8":
        return Experts(count, hidden, inner, group, device)
    return int8_or_dense(name, count, hidden, inner, torch.float32, device)


def names(launches):
    return [launch.name for launch in launches]


@pytest.fixture(autouse=True)
def _few_programs(reconfigure, device):
    """Makes programs large, as the interpreter takes the same time for a program of any size."""
    if device.type == "cpu":
        reconfigure("_few_", BLOCK_N=64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [5, 16])
@pytest.mark.parametrize("hidden,inner", [(128, 32), (256, 160), (640, 64), (128, 256)])
def test_shapes(hidden, inner, tokens, name, device):
    """Widths of experts are padded to 128, and of some the INT8 tiles are smaller."""
    experts = experts_of(name, 4, hidden, inner, device, 32)
    x, weights, ids = experts.inputs(tokens, 3)
    ids[0, 1], ids[2, 0], ids[3] = -1, 4, -1
    with record_launches(run=True) as launches:
        got = experts.launch(name, x, weights, ids, x)
    ahead = "_quantize_kernel"
    assert names(launches) == [ahead, "_few_gate_up_kernel", ahead, "_few_down_kernel"]
    _, expected = experts.run(name, x, weights, ids, x)
    assert relative_error(got, expected) < TOLERANCE
    assert torch.equal(got[3], x[3])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tiles,lanes,warps", [(4, 8, 2), (16, 8, 8), (64, 4, 8)])
def test_configurations(tiles, lanes, warps, name, reconfigure, device):
    """Tiles of a row and slots of a token are loaded in one or in several steps."""
    reconfigure("_few_", BLOCK_T=tiles, LANES=lanes, num_warps=warps)
    experts = experts_of(name, 4, 1024, 256, device)
    got, expected = experts.run(name, *experts.inputs(6, 3))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_arithmetic_of_fewer_tokens(name, reconfigure, device):
    """With the order of additions of 1 to 4 tokens it gives what their kernels give."""
    reconfigure("8_", BLOCK_T=8, LANES=8, num_warps=4)
    experts = experts_of(name, 4, 512, 128, device, 128)
    x, weights, ids = experts.inputs(8, 3)
    got = experts.launch(name, x, weights, ids, x)
    packed, size = experts.prepacked, experts.sizes[0] if experts.sizes else None
    expected = moe_decode(x, *packed, weights, ids, size, x, int8=True)
    assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_128_does_not_divide_have_the_kernels_of_fewer_tokens(name, device):
    experts = experts_of(name, 3, 192, 64, device, 32)
    inputs = experts.inputs(8, 2)
    with record_launches() as launches:
        experts.launch(name, *inputs)
    assert names(launches) == ["_decode_gate_up_kernel", "_decode_down_kernel"]
    got, expected = experts.run(name, *inputs)
    assert relative_error(got, expected) < TOLERANCE
