"""What a program says of its methods, so that others bind tensors by name.

The constant method `get_bindings` of a `.pte` returns one JSON object:

    methods   method -> inputs, outputs and hand_over, see `describe_method`
    state     tensors that sequences share and that methods update in place
    weights   tensors of the `.ptd`, shared by all methods

A tensor is an object with `name`, `dtype` and `shape`. Where a dimension varies from call to call
`shape` has its upper bounds, and `min_shape` its lower ones. A state tensor has a `pool` besides,
which its first dimension counts: "pages" or "slots". `bindings.h` reads the same.
"""

import json
from collections.abc import Mapping

import torch

from et_moe.backends.method_graph import MethodGraph

TensorSpec = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""

DTYPE_NAMES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def describe_tensors(spec: TensorSpec) -> list[dict[str, object]]:
    """The JSON of tensors whose shapes are fixed."""
    return [
        {"name": name, "dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
        for name, (dtype, shape) in spec.items()
    ]


def _describe_value(graph: MethodGraph, name: str, value: torch.Tensor) -> dict[str, object]:
    limits = [graph.bounds(size) for size in value.shape]
    (entry,) = describe_tensors({name: (value.dtype, tuple(high for _, high in limits))})
    if any(low != high for low, high in limits):
        entry["min_shape"] = [low for low, _ in limits]
    return entry


def describe_method(graph: MethodGraph, first_output: int = 0) -> dict[str, object]:
    """The JSON of what a method takes and returns per call.

    Args:
        first_output: how many other tensors the program's method returns before its outputs.

    Returns:
        `inputs`: tensors, in the order in which the program's method takes them; a program for the
        CPU takes the program's `state` and `weights` behind them.
        `outputs`: tensors, each with its `index` among what the program's method returns.
        `hand_over`: None, or the fields of `HandOver` that are not None.
    """
    nodes = graph.input_nodes()
    outputs = graph.output_values().items()
    return {
        "inputs": [_describe_value(graph, n, nodes[n].meta["val"]) for n in graph.inputs],
        "outputs": [
            _describe_value(graph, name, value) | {"index": first_output + i}
            for i, (name, value) in enumerate(outputs)
        ],
        "hand_over": None if graph.hand_over is None else graph.hand_over.describe(),
    }


def describe_state(graph: MethodGraph) -> list[dict[str, object]]:
    """The JSON of a method's state, in the order of the graph."""
    nodes = graph.input_nodes()
    return [
        _describe_value(graph, name, nodes[name].meta["val"]) | {"pool": pool}
        for name, pool in graph.state.items()
    ]


def tensor_spec(graph: MethodGraph, names: list[str]) -> TensorSpec:
    """Dtypes and shapes of weights of a graph, which must not vary."""
    nodes = graph.input_nodes()
    values = {name: nodes[name].meta["val"] for name in names}
    return {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}


def get_bindings(
    graphs: Mapping[str, MethodGraph], weights: TensorSpec, first_outputs: Mapping[str, int]
) -> str:
    """The text that the constant method `get_bindings` returns.

    Args:
        graphs: methods by name; all with the same state and weights.
        weights: what the `.ptd` holds for them, in the order of the graphs' weights.
        first_outputs: method -> see `describe_method`.

    Raises:
        ValueError: methods differ in state, or in names of weights.
    """
    states = [describe_state(graph) for graph in graphs.values()]
    if any(state != states[0] for state in states) or any(
        graph.weights != list(weights) for graph in graphs.values()
    ):
        raise ValueError(f"methods {list(graphs)} differ in state or weights")
    return json.dumps(
        {
            "methods": {
                name: describe_method(graph, first_outputs[name]) for name, graph in graphs.items()
            },
            "state": states[0],
            "weights": describe_tensors(weights),
        }
    )
