"""Ops that kernels compute together, in fewer launches."""

from torch.fx import Graph, Node

from et_moe.backends.cuda.graphs import op_arguments
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net_projected
from et_moe.backends.cuda.triton.out_projection.op import (
    attention_out,
    gated_delta_net_out,
    gated_delta_net_projected_out,
)

PLANES = {"linear_w4a8": 1, "linear_w4a16": 2, "linear_w8a8": 1, "linear_w8a16": 2}
"""INT8 planes that the activations of a linear op are quantized to."""


def _op_name(node: object) -> str:
    """The name of the `et_moe` op that a node calls; empty for anything else."""
    target = getattr(node, "target", None)
    return target._opname if getattr(target, "namespace", None) == "et_moe" else ""


def _find_projection(net: Node) -> Node | None:
    """The linear layer that can be computed together with a `gated_delta_net`, if there is one.

    Its weights are quantized, and it has no residual, and no user besides.
    """
    linear = op_arguments(net)["projected"]
    if _op_name(linear) not in PLANES or len(linear.users) > 1:
        return None
    return linear if op_arguments(linear)["residual"] is None else None


def _fuse_projection(net: Node, linear: Node) -> None:
    """Replaces a linear layer and the `gated_delta_net` behind it by one function."""
    arguments, given = op_arguments(net), op_arguments(linear)
    del arguments["projected"], given["residual"]
    planes = PLANES[_op_name(linear)]
    group = {"group_size": given.pop("group_size", None)}
    norm = {"input_norm_weight": given.pop("norm_weight"), "input_eps": given.pop("eps")}
    net.target = gated_delta_net_projected
    net.args, net.kwargs = (), {**given, **group, **norm, "planes": planes, **arguments}
    net.graph.erase_node(linear)


def _find_mixer(linear: Node) -> Node | None:
    """The attention or gated delta net that can quantize the rows of a linear layer with INT8
    activations, if there is one.

    The layer has no norm and is its only user, and no op is between them: they are computed where
    the layer is.
    """
    if PLANES.get(_op_name(linear)) != 1:
        return None
    given = op_arguments(linear)
    mixer = given["x"]
    fused = mixer.target is gated_delta_net_projected
    if not fused and _op_name(mixer) not in ("attention", "gated_delta_net"):
        return None
    if given["norm_weight"] is not None or len(mixer.users) > 1:
        return None
    node = mixer.next
    while node is not linear and not _op_name(node):
        node = node.next
    return mixer if node is linear else None


def _fuse_out_projection(linear: Node, mixer: Node) -> None:
    """Replaces an attention or gated delta net and the linear layer behind it by one function."""
    layer = op_arguments(linear)
    del layer["x"], layer["norm_weight"], layer["eps"]
    if mixer.target is gated_delta_net_projected:
        function, given = gated_delta_net_projected_out, dict(mixer.kwargs)
    else:
        is_attention = _op_name(mixer) == "attention"
        function = attention_out if is_attention else gated_delta_net_out
        given = op_arguments(mixer)
    linear.target = function
    linear.args, linear.kwargs = (), {"group_size": None, **layer, "given": given}
    linear.graph.erase_node(mixer)


def fuse(graph: Graph) -> None:
    """Replaces ops by functions that take fewer launches for few rows: each linear layer with a
    `gated_delta_net` behind it, and then each linear layer behind attention or a gated delta net.

    All other nodes of the graph stay as they are, and so do results and updates of state.
    """
    for net in list(graph.nodes):
        if _op_name(net) == "gated_delta_net" and (linear := _find_projection(net)):
            _fuse_projection(net, linear)
    for linear in list(graph.nodes):
        if mixer := _find_mixer(linear):
            _fuse_out_projection(linear, mixer)
