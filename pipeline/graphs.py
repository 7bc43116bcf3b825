"""A model's methods as exported graphs, without memory for its weights."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from et_moe.backends.method_graph import POOLS, MethodGraph
from et_moe.pipeline.config import Config
from et_moe.pipeline.models import Graph, Input, Method, Sizes, model_of
from et_moe.pipeline.quantize import meta_graph, parameter_spec
from et_moe.pipeline.storage import Precision

POOL_LIMIT = 1 << 20
"""Most pages, or slots, of a state pool."""


class _Method(nn.Module):
    """The model with its weights passed in, so that the graph has them as inputs."""

    def __init__(self, graph: Graph, method: Method) -> None:
        super().__init__()
        self._graph = (graph,)  # in a tuple: its own parameters must not become the program's
        self._names = [i.name for i in method.inputs]
        more = {"draft_tokens": method.draft_tokens, "full_logits": method.full_logits}
        self._more = {name: value for name, value in more.items() if value}

    def forward(self, inputs: list[Tensor], state: dict[str, Tensor], weights: dict[str, Tensor]):
        arguments = dict(zip(self._names, inputs, strict=True))
        return torch.func.functional_call(
            self._graph[0], weights, (), {**arguments, **self._more, "state": state}
        )


EXAMPLE_SIZE = 8
"""Size that a dimension which varies has while a method is traced, where its range allows it."""


def _example(given: Input) -> Tensor:
    sizes = (s if isinstance(s, int) else min(EXAMPLE_SIZE, s.high) for s in given.shape)
    return torch.empty(tuple(sizes), dtype=given.dtype)


def _dynamic(given: Input) -> dict[int, Dim] | None:
    """The dimensions of an input that vary, as torch.export wants them."""
    ranges = {i: s for i, s in enumerate(given.shape) if not isinstance(s, int)}
    dims = {i: Dim(f"from_{r.low}_to_{r.high}", min=r.low, max=r.high) for i, r in ranges.items()}
    return dims or None


def _pool_dims() -> dict[str, Dim]:
    return {pool: Dim(f"{pool}_in_pool", min=1, max=POOL_LIMIT) for pool in POOLS}


def build_graphs(config: Config, precision: Precision, sizes: Sizes) -> dict[str, MethodGraph]:
    """Exports the model's methods.

    Works on fake tensors: no weight is allocated, whatever the model's size.
    """
    graph = meta_graph(config, precision)
    if sizes.draft_vocabulary:
        with torch.device("meta"):
            graph.shorten_drafts(sizes.draft_vocabulary)
    spec = parameter_spec(graph)
    state_spec, pools = graph.state_spec(sizes.draft_tokens), _pool_dims()
    methods = model_of(config).methods(config, sizes)
    graphs = {}
    for method, given in methods.items():
        with FakeTensorMode():
            inputs = [_example(i) for i in given.inputs]
            state = {
                name: torch.empty((EXAMPLE_SIZE + 1, *given.shape), dtype=given.dtype)
                for name, given in state_spec.items()
            }
            weights = {n: torch.empty(shape, dtype=kind) for n, (kind, shape) in spec.items()}
        program = torch.export.export(
            _Method(graph, given),
            (inputs, state, weights),
            dynamic_shapes=(
                [_dynamic(i) for i in given.inputs],
                {name: {0: pools[given.pool]} for name, given in state_spec.items()},
                dict.fromkeys(weights),
            ),
            strict=False,
        )
        graphs[method] = MethodGraph(
            program=program,
            inputs=[i.name for i in given.inputs],
            outputs=list(given.outputs),
            state={name: given.pool for name, given in state_spec.items()},
            weights=list(weights),
            hand_over=given.hand_over,
        )
    return graphs
