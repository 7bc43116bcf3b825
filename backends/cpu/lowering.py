"""Lowers method graphs to an ExecuTorch program that runs on the CPU kernels of this folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    to_edge,
)
from executorch.exir.passes import MemoryPlanningPass
from torch.export.graph_signature import ExportGraphSignature, OutputKind

from et_moe.backends.bindings import TensorSpec, get_bindings, tensor_spec
from et_moe.backends.method_graph import MethodGraph


@dataclass(frozen=True)
class WeightPlan:
    """What the program wants in the `.ptd`: the graphs' weights as they are.

    Attributes:
        spec: name -> (dtype, shape), in the order of the graphs' weights.
        layout: none to be named: elements are in the bundle's order.
    """

    spec: TensorSpec
    layout: str = ""

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of a bundle in the order of `spec`; floats are cast to the graphs' dtype."""
        for name, (dtype, _) in self.spec.items():
            if name in tensors:
                yield name, tensors[name].to(dtype)


@dataclass(frozen=True)
class LoweredProgram:
    """A `.pte` and the weights that belong to it."""

    pte: bytes
    plan: WeightPlan


def plan_weights(graphs: Mapping[str, MethodGraph]) -> WeightPlan:
    """The weights that the methods share.

    Raises:
        ValueError: methods differ in weights.
    """
    specs = [tensor_spec(graph, graph.weights) for graph in graphs.values()]
    if any(spec != specs[0] for spec in specs):
        raise ValueError(f"methods {list(graphs)} differ in state or weights")
    return WeightPlan(specs[0])


def _count_updates(signature: ExportGraphSignature) -> int:
    """How many results of a method are inputs that it updates; its outputs come behind them."""
    kinds = [spec.kind for spec in signature.output_specs]
    count = sum(kind != OutputKind.USER_OUTPUT for kind in kinds)
    if any(kind != OutputKind.USER_OUTPUT for kind in kinds[count:]):
        raise RuntimeError("torch returns outputs before updated inputs, which is not expected")
    return count


def lower(graphs: Mapping[str, MethodGraph], constants: Mapping[str, object]) -> LoweredProgram:
    """Makes a `.pte` whose methods take their inputs, then state, then weights.

    State and weights are inputs that the runner binds once: it allocates the state, and maps the
    weights from the `.ptd`. The constant method `get_bindings` (see `backends/bindings.py`) lists
    them. Methods return the updated state before their outputs.

    Args:
        graphs: methods by name; all with the same state and weights.
        constants: further constant methods: ints and strings.

    Raises:
        ValueError: methods differ in state or weights.
    """
    plan = plan_weights(graphs)
    # Custom ops are not part of the core ATen set that the check knows.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = to_edge({name: graph.program for name, graph in graphs.items()}, compile_config=config)
    programs = {name: edge.exported_program(name) for name in graphs}
    updates = {name: _count_updates(p.graph_signature) for name, p in programs.items()}
    bindings = get_bindings(graphs, plan.spec, updates)
    # Where the outputs are is known only now, and `to_edge` takes constants before.
    constants = {**constants, "get_backend": json.dumps("cpu"), "get_bindings": bindings}
    planning = MemoryPlanningPass(alloc_graph_input=False)
    program = EdgeProgramManager(programs, constants, config).to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning)
    )
    return LoweredProgram(program.buffer, plan)
