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


@dataclass(frozen=True)
class WeightPlan:
    """What the program wants in the `.ptd`: the graphs' weights as they are.

    Attributes:
        spec: name -> (dtype, shape), in the order of the graphs' weights.
    """

    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]]

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


def _inputs(graph: MethodGraph) -> dict[str, tuple[torch.dtype, tuple]]:
    """Dtype and shape of the state and weight inputs, by name."""
    names = [*graph.inputs, *graph.state, *graph.weights]
    nodes = [n for n in graph.program.graph.nodes if n.op == "placeholder"]
    values = {name: node.meta["val"] for name, node in zip(names, nodes, strict=True)}
    return {name: (values[name].dtype, tuple(values[name].shape)) for name in names}


def lower(graphs: dict[str, MethodGraph], constants: dict[str, object]) -> LoweredProgram:
    """Makes a `.pte` whose methods take runtime inputs, then state, then weights.

    State and weights are inputs that the runner binds once (state it allocates, weights it maps
    from the `.ptd`), listed by the constant method `get_bindings`, a JSON object of lists
    [name, dtype, shape]. Methods return the mutated state first, then token and logits.

    Args:
        graphs: methods by name; all with the same state and weights.
        constants: further constant methods: ints and strings.
    """
    bindings = []
    for graph in graphs.values():
        inputs = _inputs(graph)
        bindings.append([(n, *inputs[n]) for n in (*graph.state, *graph.weights)])
    if any(b != bindings[0] for b in bindings):
        raise ValueError(f"methods {list(graphs)} differ in state or weights")
    listed = [[name, DTYPE_NAMES[dtype], list(shape)] for name, dtype, shape in bindings[0]]
    count = len(next(iter(graphs.values())).state)
    edge = to_edge(
        {name: graph.program for name, graph in graphs.items()},
        # Custom ops are not part of the core ATen set that the check knows.
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            **constants,
            "get_backend": json.dumps("cpu"),
            "get_bindings": json.dumps({"state": listed[:count], "weights": listed[count:]}),
        },
    )
    planning = MemoryPlanningPass(alloc_graph_input=False)
    program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    plan = WeightPlan({name: (dtype, shape) for name, dtype, shape in bindings[0][count:]})
    return LoweredProgram(program.buffer, plan)
