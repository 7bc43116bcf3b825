"""Lowers method graphs to an ExecuTorch program that runs on the CPU kernels of this folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes import MemoryPlanningPass

from et_moe.backends.method_graph import MethodGraph

DTYPE_NAMES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int64: "int64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}


WeightSpec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class WeightPlan:
    """What the program wants in the `.ptd`: the graphs' weights as they are.

    Attributes:
        spec: name -> (dtype, shape), in the order of the graphs' weights.
        layout: none to be named: elements are in the bundle's order.
    """

    spec: WeightSpec
    layout: str = ""

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of a bundle in the order of `spec`, floats cast to the graphs' dtype."""
        for name, (dtype, _) in self.spec.items():
            if name in tensors:
                yield name, tensors[name].to(dtype)


@dataclass(frozen=True)
class LoweredProgram:
    """A `.pte` and the weights that belong to it."""

    pte: bytes
    plan: WeightPlan


def _inputs(graph: MethodGraph) -> WeightSpec:
    """Dtype and shape of the state and weight inputs, by name."""
    names = [*graph.inputs, *graph.state, *graph.weights]
    nodes = [n for n in graph.program.graph.nodes if n.op == "placeholder"]
    values = {name: node.meta["val"] for name, node in zip(names, nodes, strict=True)}
    return {name: (values[name].dtype, tuple(values[name].shape)) for name in names}


def _bindings(graphs: Mapping[str, MethodGraph]) -> tuple[WeightSpec, WeightSpec]:
    """State and weights by name, which all methods must agree on."""
    found = []
    for graph in graphs.values():
        inputs = _inputs(graph)
        found.append(({n: inputs[n] for n in graph.state}, {n: inputs[n] for n in graph.weights}))
    if any(f != found[0] for f in found):
        raise ValueError(f"methods {list(graphs)} differ in state or weights")
    return found[0]


def plan_weights(graphs: Mapping[str, MethodGraph]) -> WeightPlan:
    """The weights that the methods share."""
    return WeightPlan(_bindings(graphs)[1])


def lower(graphs: Mapping[str, MethodGraph], constants: Mapping[str, object]) -> LoweredProgram:
    """Makes a `.pte` whose methods take runtime inputs, then state, then weights.

    State and weights are inputs that the runner binds once (state it allocates, weights it maps
    from the `.ptd`), listed by the constant method `get_bindings`, a JSON object of lists
    [name, dtype, shape]. Methods return the mutated state first, then token and logits.

    Args:
        graphs: methods by name; all with the same state and weights.
        constants: further constant methods: ints and strings.
    """
    state, weights = _bindings(graphs)
    bindings = {
        kind: [[name, DTYPE_NAMES[dtype], list(shape)] for name, (dtype, shape) in spec.items()]
        for kind, spec in (("state", state), ("weights", weights))
    }
    edge = to_edge(
        {name: graph.program for name, graph in graphs.items()},
        # Custom ops are not part of the core ATen set that the check knows.
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            **constants,
            "get_backend": json.dumps("cpu"),
            "get_bindings": json.dumps(bindings),
        },
    )
    planning = MemoryPlanningPass(alloc_graph_input=False)
    program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    return LoweredProgram(program.buffer, WeightPlan(weights))
