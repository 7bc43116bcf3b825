"""Lowers method graphs to an ExecuTorch program that runs on the CPU kernels of this folder."""

import json

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


def _describe(graph: MethodGraph) -> dict[str, list]:
    """Names, dtypes and shapes of the state and weight inputs, in the order of the method."""
    names = [*graph.inputs, *graph.state, *graph.weights]
    nodes = [n for n in graph.program.graph.nodes if n.op == "placeholder"]
    entries = {
        name: [name, DTYPE_NAMES[node.meta["val"].dtype], list(node.meta["val"].shape)]
        for name, node in zip(names, nodes, strict=True)
        if name not in graph.inputs
    }
    return {
        "state": [entries[name] for name in graph.state],
        "weights": [entries[name] for name in graph.weights],
    }


def lower(graphs: dict[str, MethodGraph], constants: dict[str, object]) -> bytes:
    """Makes a `.pte` whose methods take runtime inputs, then state, then weights.

    State and weights are inputs that the runner binds once (state it allocates, weights it maps
    from the `.ptd`), listed by the constant method `get_bindings`, a JSON object of lists
    [name, dtype, shape]. Methods return the mutated state first, then token and logits.

    Args:
        graphs: methods by name; all with the same state and weights.
        constants: further constant methods: ints and strings.
    """
    bindings = [_describe(graph) for graph in graphs.values()]
    if any(b != bindings[0] for b in bindings):
        raise ValueError(f"methods {list(graphs)} differ in state or weights")
    edge = to_edge(
        {name: graph.program for name, graph in graphs.items()},
        # Custom ops are not part of the core ATen set that the check knows.
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            **constants,
            "get_backend": json.dumps("cpu"),
            "get_bindings": json.dumps(bindings[0]),
        },
    )
    planning = MemoryPlanningPass(alloc_graph_input=False)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
