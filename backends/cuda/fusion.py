"""Pairs of ops that kernels compute together, in fewer launches."""

from torch.fx import Graph, Node

from et_moe.backends.cuda.graphs import op_arguments
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net_projected

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


def fuse(graph: Graph) -> None:
    """Replaces each linear layer with a `gated_delta_net` behind it by one function, which takes
    fewer launches for few rows.

    All other nodes of the graph stay as they are, and so do results and updates of state.
    """
    for net in list(graph.nodes):
        if _op_name(net) != "gated_delta_net" or (linear := _find_projection(net)) is None:
            continue
        arguments, given = op_arguments(net), op_arguments(linear)
        del arguments["projected"], given["residual"]
        planes = PLANES[_op_name(linear)]
        group = {"group_size": given.pop("group_size", None)}
        norm = {"input_norm_weight": given.pop("norm_weight"), "input_eps": given.pop("eps")}
        net.target = gated_delta_net_projected
        net.args, net.kwargs = (), {**given, **group, **norm, "planes": planes, **arguments}
        graph.erase_node(linear)
