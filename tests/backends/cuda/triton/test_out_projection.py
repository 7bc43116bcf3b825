"""Attention and gated delta nets that quantize the rows of the linear layer behind them.

Results and states have the bits of the two ops one after the other; of attention only under the
interpreter, since a GPU adds up splits in another order for a whole tile of columns. The ops
themselves are compared with their references elsewhere.
"""

import pytest
import test_attention
import torch
import triton
from linear_weights import weights
from test_attention import make_inputs
from test_gated_delta_net import STATES, TOLERANCE, clone, make_batch, net_inputs, relative_error

from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.gated_delta_net.op import (
    gated_delta_net,
    gated_delta_net_projected,
)
from et_moe.backends.cuda.triton.out_projection.op import (
    attention_out,
    gated_delta_net_out,
    gated_delta_net_projected_out,
)
from et_moe.backends.cuda.triton.table import TRITON_OPS

N, HEAD = 48, 128
NET = (1, 2, 16, HEAD, 4)
OPS = ["linear_w4a8", "linear_w8a8"]
AHEAD = "quantize_rows_kernel"


class Layer:
    """A random linear layer with a residual, behind another op."""

    def __init__(self, op: str, rows: int, k: int, dtype, device, group: int = 128) -> None:
        self._op, self._residual = TRITON_OPS[op], torch.randn(rows, N).to(device, dtype)
        self._packed = weights(op, N, k, group, device)[1]

    def behind(self, function, given: dict) -> torch.Tensor:
        return self._op(function(**given), *self._packed, residual=self._residual)

    def fused(self, function, given: dict) -> torch.Tensor:
        weight, scale, *group = self._packed
        layer = {"group_size": group[0] if group else None, "residual": self._residual}
        return function(given, weight=weight, scale=scale, **layer)


def check(layer: Layer, ops: tuple, given: dict, names: list[str], quantized: bool = True) -> None:
    """Compares a function with the ops, given as a pair, in results, in the tensors `names` that
    they update, and in the launches that they take."""
    function, op = ops
    together, apart = clone(given), clone(given)
    with record_launches(run=True) as fewer:
        got = layer.fused(function, together)
    with record_launches(run=True) as more:
        expected = layer.behind(op, apart)
    if op is attention and not triton.knobs.runtime.interpret:
        assert relative_error(got, expected) < TOLERANCE[got.dtype]
    else:
        assert torch.equal(got, expected)
    for name in names:
        assert torch.equal(together[name], apart[name]), name
    launches = [launch.name for launch in more]
    if quantized:
        launches.pop(-1 - launches[::-1].index(AHEAD))
    assert [launch.name for launch in fewer] == launches


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_net(dtype, op, device):
    """Of five sequences, two of which have no row."""
    given = make_batch(net_inputs(NET, 5, dtype, device), *STATES)
    given["projected"][1] = float("nan")
    layer = Layer(op, 5, 2 * HEAD, dtype, device)
    check(layer, (gated_delta_net_out, gated_delta_net), given, list(STATES))


def with_projection(op: str, given: dict, dtype, device) -> dict:
    """The arguments of `gated_delta_net_projected` with a random projection."""
    rows, width = given.pop("projected").shape
    weight, scale, *group = weights(op, width, 256, 128, device)[1]
    return given | {
        "x": torch.randn(rows, 256).to(device, dtype),
        "weight": weight,
        "scale": scale,
        "group_size": group[0] if group else None,
        "input_norm_weight": torch.randn(256).to(device, dtype),
        "input_eps": 1e-6,
        "planes": 1,
        "eps": 1e-5,
    }


@pytest.mark.parametrize("op", OPS)
def test_net_with_projection(op, device):
    """Six rows: two of each of three sequences, each of which leaves a version."""
    dtype = torch.bfloat16
    given = net_inputs(NET, 6, dtype, device)
    given["conv_state"] = torch.randn(4, 2 + 3, given["conv_state"].shape[-1]).to(device, dtype)
    given["recurrent_state"] = torch.randn(4, 3, 2, 16, HEAD, device=device)
    given |= {
        "slots": torch.tensor([2, 0, 3], dtype=torch.int32, device=device),
        "versions": torch.tensor([0, 2, 1], device=device),
        "num_tokens": torch.tensor([2, 1, 0], device=device),
    }
    given = with_projection(op, given, dtype, device)
    layer = Layer(op, 6, 2 * HEAD, dtype, device)
    results = []
    fused = (layer.fused, gated_delta_net_projected_out)
    for run, function in (fused, (layer.behind, gated_delta_net_projected)):
        own = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        results.append((run(function, own | {"each_row": True}), *(own[n] for n in STATES)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_of_sequences(dtype, op, device):
    """Heads of two tiles; one sequence has no row."""
    given = test_attention.make_batch((1, 2, 2 * HEAD, 4, 128), dtype, device)
    rows = given["qkv"].shape[0]
    assert rows > 4 and 0 in given["num_tokens"].tolist()
    layer = Layer(op, rows, 4 * HEAD, dtype, device)
    check(layer, (attention_out, attention), given, ["k_cache", "v_cache"])


@pytest.mark.parametrize("position,quantized", [(1100, True), (5, False)])
def test_attention_of_a_prompt(position, quantized, device):
    """Rows are quantized where splits of a long cache are joined."""
    capacity = 1280 if quantized else 128
    given = make_inputs((1, 2, HEAD, 4, capacity), 7, position, torch.bfloat16, device)
    given["num_tokens"] = torch.tensor([6], device=device)
    layer = Layer("linear_w4a8", 7, 2 * HEAD, torch.bfloat16, device)
    pools = ["k_cache", "v_cache"]
    check(layer, (attention_out, attention), given, pools, quantized)


@pytest.mark.parametrize("shape,rows,group", [(NET, 4, 128), (NET, 17, 128), (NET, 5, 32)])
def test_other_rows_and_layers(shape, rows, group, device):
    """Layers that do not take rows quantized ahead, or no such rows, get them as they are."""
    given = net_inputs(shape, rows, torch.bfloat16, device)
    layer = Layer("linear_w4a8", rows, 2 * HEAD, torch.bfloat16, device, group)
    check(layer, (gated_delta_net_out, gated_delta_net), given, list(STATES), quantized=False)


def test_other_heads(device):
    """A head is a tile, or rows stay as they are."""
    given = make_batch(net_inputs((1, 4, 16, 64, 4), 5, torch.bfloat16, device), *STATES)
    layer = Layer("linear_w4a8", 5, 256, torch.bfloat16, device)
    check(layer, (gated_delta_net_out, gated_delta_net), given, list(STATES), quantized=False)


def test_a_layer_of_other_columns(device):
    given = make_batch(net_inputs(NET, 5, torch.bfloat16, device), *STATES)
    layer = Layer("linear_w4a8", 5, 512, torch.bfloat16, device)
    with pytest.raises(ValueError, match="x of 256 columns"):
        layer.fused(gated_delta_net_out, given)
