"""Ops that their kernels compute in fewer launches together."""

from torch.fx import Graph, Node

from et_moe.backends.cuda.graphs import op_arguments
from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net_projected
from et_moe.backends.cuda.triton.linear.decode import supports_k

PLANES = {"linear_w4a8": 1, "linear_w4a16": 2}


def _op(node: object) -> str:
    """Name of the op that a node calls; of anything else nothing."""
    target = getattr(node, "target", None)
    return target._opname if getattr(target, "namespace", None) == "et_moe" else ""


def _projection(net: Node) -> Node | None:
    """The linear layer that can be computed with a `gated_delta_net`: one token, nobody else's."""
    arguments = op_arguments(net)
    linear = arguments["projected"]
    if _op(linear) not in PLANES or len(linear.users) > 1 or arguments["num_tokens"] is not None:
        return None
    given = op_arguments(linear)
    tokens, k = given["x"].meta["val"].shape
    return linear if is_one(tokens) and given["residual"] is None and supports_k(k) else None


def fuse(graph: Graph) -> None:
    """Replaces a linear layer and the `gated_delta_net` of one token behind it by one function.

    A graph's other nodes stay calls of ops; results and updates of state are the same.
    """
    for net in list(graph.nodes):
        if _op(net) != "gated_delta_net" or (linear := _projection(net)) is None:
            continue
        arguments, given = op_arguments(net), op_arguments(linear)
        del arguments["projected"], arguments["num_tokens"]
        del given["residual"]
        planes = PLANES[_op(linear)]
        norm = {"input_norm_weight": given.pop("norm_weight"), "input_eps": given.pop("eps")}
        net.target = gated_delta_net_projected
        net.args, net.kwargs = (), {**given, **norm, "planes": planes, **arguments}
        graph.erase_node(linear)
