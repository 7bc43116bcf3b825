"""The graphs that are lowered, run node by node: interpreted kernels against the references."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL_FOR_CUDA, storages
from torch import fx

from et_moe.backends.cuda.fusion import fuse
from et_moe.backends.cuda.prepack import plan_weights
from et_moe.backends.cuda.triton.table import TRITON_OPS
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.graphs import build_graphs
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.models import Sizes
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Dense, Int4, Int8PerRow, Precision

SAMPLING = {
    "temperature": torch.zeros(1),
    "top_k": torch.zeros(1, dtype=torch.int64),
    "top_p": torch.ones(1),
    "seed": torch.zeros(1, dtype=torch.int64),
}


POOL = 4
"""Pages, and slots, of the state."""


class Executor(fx.Interpreter):
    """Runs a graph with other functions in place of its ops, and keeps the tensors that its nodes
    return."""

    def __init__(self, graph: fx.Graph, functions: dict) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph))
        self._functions = functions
        self.results: dict[str, list[torch.Tensor]] = {}

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        values = result if isinstance(result, (tuple, list)) else [result]
        if node.op == "call_function" and all(isinstance(v, torch.Tensor) for v in values):
            self.results[node.name] = [v.clone() for v in values]
        return result

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", None) == "et_moe":
            target = self._functions.get(target._opname, target)
        return super().call_function(target, args, kwargs)


class Side:
    """One implementation with its weights and its state. Ops for which it has no function are
    computed by their references."""

    def __init__(self, graphs: dict, weights: dict, functions: dict) -> None:
        self._graphs, self._weights, self._functions = graphs, weights, functions
        nodes = graphs["decode"].input_nodes()
        values = {name: nodes[name].meta["val"] for name in graphs["decode"].state}
        self.state = {
            name: torch.zeros((POOL, *value.shape[1:]), dtype=value.dtype)
            for name, value in values.items()
        }

    def run(self, method: str, inputs: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        graph = copy.deepcopy(self._graphs[method].program.graph)
        if self._functions:
            fuse(graph)
        count = len(inputs["tokens"])
        sampling = {name: value.repeat(count) for name, value in SAMPLING.items()}
        values = inputs | sampling | self.state | self._weights
        names = {node.name: name for name, node in self._graphs[method].input_nodes().items()}
        executor = Executor(graph, self._functions)
        placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
        executor.run(*(values[names[n]] if n in names else None for n in placeholders))
        return executor.results


STORED = {
    "4w": {"shared_expert": Int4(32)},
    "others": {
        "embedding": Int4(32),
        "attention": Dense(),
        "linear_attention": Int8PerRow(),
        "experts": Int8PerRow(),
        "shared_expert": Dense(),
        "head": Int8PerRow(),
    },
}
"""How parts are stored, if not as INT4; of the embedding, if not as INT8."""


def lower(
    directory: Path,
    precision: str,
    dtype: torch.dtype,
    sizes: Sizes,
    stored: str = "4w",
) -> tuple:
    """The graphs of a random model, its weights, and its weights as kernels take them."""
    make_checkpoint(directory, MODEL, "tiny", seed=3, overrides=SMALL_FOR_CUDA)
    parts = storages("4w", 32, "8w") | STORED[stored]
    source = QuantizedCheckpoint(Checkpoint(directory), parts)
    graphs = build_graphs(source.config, Precision(source.storages, precision, dtype), sizes)
    weights = {name: tensor for group in source.groups() for name, tensor in group.items()}
    nodes = graphs["decode"].input_nodes()
    for name in graphs["decode"].weights:
        weights[name] = weights[name].to(nodes[name].meta["val"].dtype)
    return graphs, weights, dict(plan_weights(graphs).pack(weights))


@pytest.fixture(params=[("4w", "int8"), ("4w", "bf16"), ("others", "int8")], ids="-".join)
def sides(request, tmp_path) -> tuple[Side, Side]:
    """A random fp32 model computed by the references, and computed by the Triton kernels."""
    graphs, weights, packed = lower(
        tmp_path, request.param[1], torch.float32, Sizes(64, 64, 4), request.param[0]
    )
    return Side(graphs, weights, {}), Side(graphs, packed, TRITON_OPS)


def same(expected: torch.Tensor, actual: torch.Tensor, what: str) -> None:
    if not expected.is_floating_point():
        assert torch.equal(expected, actual.to(expected.dtype)), what
    else:
        error = (actual.double() - expected.double()).norm()
        # `linear_w4a16` takes activations with 15 bits, and errors add up.
        assert error <= 1e-3 * expected.double().norm(), f"{what}: {error}"


def run_both(sides, method: str, inputs: dict[str, torch.Tensor], valid: int | None) -> set[str]:
    """Compares all that a call computes, of which `valid` rows are no padding; None for all.

    Returns:
        The nodes that only the references compute.
    """
    expected, actual = (side.run(method, inputs) for side in sides)
    assert len(actual) > 10
    rows = inputs["tokens"].numel()
    for name, values in actual.items():
        for x, y in zip(expected[name], values, strict=True):
            # Nobody reads the rows of padding: ops may leave anything there.
            end = valid if x.dim() and x.shape[0] == rows else None
            same(x[:end], y[:end], f"{method} {name}")
    for name, state in sides[0].state.items():
        same(state, sides[1].state[name], f"{method} {name}")
    return expected.keys() - actual.keys()


def places(positions: list[int], slots: list[int], pages: list[int]) -> dict[str, torch.Tensor]:
    return {
        "positions": torch.tensor(positions),
        "slots": torch.tensor(slots, dtype=torch.int32),
        "pages": torch.tensor(pages, dtype=torch.int32)[:, None],
    }


def is_fused(names: set[str]) -> bool:
    """Whether the nodes are those of the model's gated delta net and of its attention: the net's
    projection, and what is in front of a quantized out projection with INT8 activations."""
    kinds = sorted(name.rstrip("0123456789_") for name in names)
    projection = [kind for kind in kinds if kind.startswith("linear_w")]
    return len(projection) == 1 and set(kinds) <= {*projection, "gated_delta_net", "attention"}


def test_prefill_with_padding_then_decode(sides) -> None:
    tokens = torch.tensor([[5, 77, 130, 200, 9, 31, 64, 0, 0, 0]])
    one = places([0], [1], [2]) | {"num_tokens": torch.tensor([7])}
    fused = run_both(sides, "prefill", {"tokens": tokens} | one, 7)
    for i, token in enumerate((8, 250)):
        inputs = {"tokens": torch.tensor([[token]])} | places([7 + i], [1], [2])
        fused |= run_both(sides, "decode", inputs, None)
    assert is_fused(fused)


def test_decode_of_several_sequences(sides) -> None:
    """Two that have begun, one that begins, and padding."""
    for slot, tokens in ((3, [5, 77, 130]), (0, [9, 31])):
        inputs = {"tokens": torch.tensor([tokens]), "num_tokens": torch.tensor([len(tokens)])}
        assert is_fused(run_both(sides, "prefill", inputs | places([0], [slot], [slot]), None))
    inputs = {
        "tokens": torch.tensor([[8], [250], [1], [0]]),
        "num_tokens": torch.tensor([1, 1, 1, 0]),
    }
    where = places([3, 2, 0, 0], [3, 0, 1, 0], [3, 0, 1, 0])
    assert is_fused(run_both(sides, "decode_batch", inputs | where, 3))


def test_pieces_of_a_prompt_change_no_bit(tmp_path) -> None:
    """Of state and results, as long as the same kernels compute them: pieces end at pages."""
    graphs, _, packed = lower(tmp_path, "int8", torch.bfloat16, Sizes(128, 128, 1))
    tokens = torch.randint(264, (1, 100), generator=torch.Generator().manual_seed(1))
    made = []
    for cuts in ((0, 100), (0, 64, 100)):
        side = Side(graphs, packed, TRITON_OPS)
        for begin, end in itertools.pairwise(cuts):
            where = places([begin], [1], [2]) | {"num_tokens": torch.tensor([end - begin])}
            where["pages"] = torch.tensor([[2, 0]], dtype=torch.int32)
            results = side.run("prefill", {"tokens": tokens[:, begin:end]} | where)
        made.append((side.state, results))
    (whole_state, whole), (state, results) = made
    for name in whole_state:
        assert torch.equal(state[name], whole_state[name]), name
    for name, (value, *_) in results.items():
        if value.is_floating_point():
            assert torch.equal(value[-1], whole[name][0][-1]), name
