"""Which ops are computed together; that results stay the same is tested in test_graph_execution."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.fx import Node

from et_moe.backends.cuda.fusion import fuse
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net_projected
from et_moe.backends.cuda.triton.out_projection.op import (
    attention_out,
    gated_delta_net_out,
    gated_delta_net_projected_out,
)

HEADS, DIM, TAPS, GROUP = 2, 16, 4, 32
CHANNELS = 3 * HEADS * DIM
WIDTH = CHANNELS + HEADS * DIM + 2 * HEADS
N = 64


class Net(nn.Module):
    """A projection and a gated delta net."""

    def __init__(
        self,
        op: str = "linear_w4a8",
        residual: bool = False,
        shared: bool = False,
        versions: bool = False,
    ):
        super().__init__()
        self.op, self.residual, self.shared, self.versions = op, residual, shared, versions

    def forward(self, x, residual, num_tokens, linear, net, state):
        op = getattr(torch.ops.et_moe, self.op)
        weights = {"linear": linear[:1], "linear_w8a8": linear}.get(self.op, (*linear, GROUP))
        y = op(x, *weights, eps=1e-5, residual=residual if self.residual else None)
        more = (num_tokens, state[-1].long() if self.versions else None, self.versions)
        out = torch.ops.et_moe.gated_delta_net(y, *net, *state, 1e-4, *more)
        return out, y.sum() if self.shared else None


def empty_net(versions: bool = False) -> tuple[tuple, tuple]:
    """Weights and state of a gated delta net."""
    weights = (
        torch.empty(CHANNELS, TAPS),
        torch.empty(HEADS),
        torch.empty(HEADS),
        torch.empty(DIM),
    )
    states = (
        torch.empty(1, TAPS - 1, CHANNELS),
        torch.empty(1, *(1,) * versions, HEADS, DIM, DIM),
        torch.empty(1, dtype=torch.int32),
    )
    return weights, states


def fused(model: Net, tokens: int = 1, k: int = 256, num_tokens: bool = False, dynamic=False):
    """The targets of the graph's nodes, and the keyword arguments of the fused node if there is
    one."""
    with FakeTensorMode():
        weight, scale = torch.empty((WIDTH, k // 2), dtype=torch.uint8), (WIDTH, k // GROUP)
        if model.op == "linear":
            weight = torch.empty((WIDTH, k))
        elif model.op == "linear_w8a8":
            weight, scale = torch.empty((WIDTH, k), dtype=torch.int8), (WIDTH, 1)
        arguments = (
            torch.empty(tokens, k),
            torch.empty(tokens, WIDTH),
            torch.empty(1, dtype=torch.int64) if num_tokens else None,
            (weight, torch.empty(scale, dtype=torch.bfloat16)),
            *empty_net(model.versions),
        )
    rows = {0: Dim("T", min=2, max=64)} if dynamic else None
    shapes = (rows, rows, None, (None,) * 2, (None,) * 4, (None,) * 3)
    graph = export(model, arguments, dynamic_shapes=shapes).graph
    fuse(graph)
    graph.lint()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return next((n.kwargs for n in calls if n.target is gated_delta_net_projected), None), calls


@pytest.mark.parametrize(
    ("op", "planes", "group"),
    [("linear_w4a8", 1, GROUP), ("linear_w4a16", 2, GROUP), ("linear_w8a8", 1, None)],
)
def test_one_token(op, planes, group):
    kwargs, calls = fused(Net(op))
    assert len(calls) == 1
    assert kwargs["planes"] == planes and kwargs["group_size"] == group
    assert kwargs["input_norm_weight"] is None
    assert (kwargs["input_eps"], kwargs["eps"]) == (1e-5, 1e-4)
    assert kwargs["slots"].meta["val"].dtype == torch.int32


@pytest.mark.parametrize("options", [{"tokens": 2}, {"tokens": 8, "dynamic": True}, {"k": 128}])
def test_how_many_rows_does_not_matter(options):
    """The function chooses the kernels, when it is known for which sizes they are compiled."""
    kwargs, calls = fused(Net(), num_tokens=True, **options)
    assert len(calls) == 1
    assert kwargs["num_tokens"].meta["val"].dtype == torch.int64


def test_rows_that_go_on_from_a_version():
    kwargs, _ = fused(Net(versions=True))
    assert kwargs["versions"].meta["val"].dtype == torch.int64 and kwargs["each_row"]
    kwargs, _ = fused(Net())
    assert kwargs["versions"] is None and not kwargs["each_row"]


@pytest.mark.parametrize(
    "model",
    [Net(residual=True), Net(shared=True), Net("linear")],
    ids=["residual", "other user", "not quantized"],
)
def test_left_alone(model):
    kwargs, calls = fused(model)
    assert kwargs is None
    targets = [str(node.target) for node in calls]
    assert f"et_moe.{model.op}.default" in targets and "et_moe.gated_delta_net.default" in targets


class Mixer(nn.Module):
    """Attention or a gated delta net, and the linear layer behind it."""

    def __init__(self, what: str, op: str = "linear_w4a8", between: bool = False, **layer: bool):
        super().__init__()
        self.what, self.op, self.between, self.layer = what, op, between, layer

    def forward(self, projected, residual, linear, weights, state):
        mixed = getattr(torch.ops.et_moe, self.what)(projected, *weights, *state)
        if self.between:
            residual = torch.ops.et_moe.rms_norm(residual, residual[0])
        group = (GROUP,) if "w4" in self.op else ()
        more = {"residual": residual} if self.layer.get("residual") else {}
        more |= {"norm_weight": linear[2]} if self.layer.get("norm") else {}
        out = getattr(torch.ops.et_moe, self.op)(mixed, *linear[:2], *group, **more)
        return out, mixed.sum() if self.layer.get("shared") else None


def fused_mixer(model: Mixer) -> list[Node]:
    """The calls of the graph behind `fuse`."""
    columns = HEADS * DIM
    with FakeTensorMode():
        weight = torch.empty((N, columns // 2), dtype=torch.uint8)
        scale = torch.empty(N, columns // GROUP)
        if "w8" in model.op:
            weight, scale = torch.empty((N, columns), dtype=torch.int8), torch.empty(N, 1)
        if model.what == "attention":
            width = 2 * (HEADS + 1) * DIM
            weights = (torch.empty(DIM), torch.empty(DIM), torch.empty(4))
            state = (torch.empty(2, 1, 64, DIM), torch.empty(2, 1, 64, DIM))
            state += (torch.empty(1, 2, dtype=torch.int32), torch.empty(1, dtype=torch.int64))
        else:
            width, weights, state = WIDTH, *empty_net()
        linear = (weight, scale, torch.empty(columns))
        arguments = (torch.empty(8, width), torch.empty(8, N), linear, weights, state)
    graph = export(model, arguments).graph
    fuse(graph)
    graph.lint()
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("what", "function"),
    [("attention", attention_out), ("gated_delta_net", gated_delta_net_out)],
)
@pytest.mark.parametrize("op", ["linear_w4a8", "linear_w8a8"])
@pytest.mark.parametrize("residual", [False, True])
def test_out_projections(what, function, op, residual):
    (node,) = fused_mixer(Mixer(what, op, residual=residual))
    assert node.target is function
    assert node.kwargs["group_size"] == (GROUP if op == "linear_w4a8" else None)
    assert (node.kwargs["residual"] is not None) == residual
    assert ("pages" in node.kwargs["given"]) == (what == "attention")


@pytest.mark.parametrize(
    "options",
    [
        {"op": "linear_w4a16"},
        {"op": "linear_w8a16"},
        {"norm": True},
        {"shared": True},
        {"between": True, "residual": True},
    ],
    ids=["16 bits", "16 bits, INT8 weights", "norm", "other user", "an op between"],
)
@pytest.mark.parametrize("what", ["attention", "gated_delta_net"])
def test_out_projections_left_alone(what, options):
    targets = [str(node.target) for node in fused_mixer(Mixer(what, **options))]
    assert f"et_moe.{what}.default" in targets
    assert f"et_moe.{options.get('op', 'linear_w4a8')}.default" in targets


def test_a_net_between_its_projections():
    """All three are one call, whose arguments are those of the two in front."""

    class Both(Mixer):
        def forward(self, projected, residual, linear, weights, state):
            weight = torch.empty((WIDTH, N // 2), dtype=torch.uint8)
            scale = torch.empty(WIDTH, N // GROUP)
            projected = torch.ops.et_moe.linear_w4a8(residual, weight, scale, GROUP)
            return super().forward(projected, residual, linear, weights, state)

    calls = fused_mixer(Both("gated_delta_net", residual=True))
    node = next(node for node in calls if node.target is gated_delta_net_projected_out)
    assert {"x", "weight", "planes", "conv_weight"} <= set(node.kwargs["given"])
