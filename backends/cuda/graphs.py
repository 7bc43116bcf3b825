"""Reading a method's graph: its inputs and outputs by name."""

import torch
from torch.fx import Node

from et_moe.backends.method_graph import MethodGraph

DTYPE_NAMES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}


def input_nodes(graph: MethodGraph) -> dict[str, Node]:
    """Placeholders by name, in the order of the method: inputs, state, weights."""
    nodes = [
        node
        for node in graph.program.graph.nodes
        if node.op == "placeholder" and node.meta["val"] is not None  # None: an absent option
    ]
    names = [*graph.inputs, *graph.state, *graph.weights]
    if len(names) != len(nodes):
        raise ValueError(f"the graph has {len(nodes)} inputs, {len(names)} are named")
    return dict(zip(names, nodes, strict=True))


def op_arguments(node: Node) -> dict[str, object]:
    """Arguments of an op's call by name, those that it leaves out included."""
    schema = node.target._schema.arguments
    given = zip((argument.name for argument in schema), node.args, strict=False)
    return {**{a.name: a.default_value for a in schema}, **dict(given), **node.kwargs}


def output_values(graph: MethodGraph) -> list[torch.Tensor]:
    """Fake tensors of the method's results."""
    return [node.meta["val"] for node in graph.program.graph.output_node().args[0]]


def bounds(graph: MethodGraph, size: int | torch.SymInt) -> tuple[int, int]:
    """Smallest and largest value of a dimension."""
    if isinstance(size, int):
        return size, size
    limits = graph.program.range_constraints[size.node.expr]
    return int(limits.lower), int(limits.upper)
