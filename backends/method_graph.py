"""What the model hands to a backend: one exported method, with the meaning of its tensors."""

from dataclasses import asdict, dataclass, field

import torch
from torch.export import ExportedProgram
from torch.fx import Node

PAGES, SLOTS = "pages", "slots"
POOLS = (PAGES, SLOTS)
"""What state tensors are made of, see `ops/sequences.py`: pages of the KV cache, or slots of
sequences. The first dimension of a state tensor counts them; a runner chooses their number."""


@dataclass(frozen=True)
class HandOver:
    """How a method that draws tokens makes the inputs of its next call, all by name.

    A backend may start that call before anyone has seen the tokens.

    Attributes:
        token: the output that is the next token of each sequence, `int64 [B, 1]`; with `versions`
            `int64 [B, 1 + R]`: how many drafts were accepted, and the R tokens of the next call.
        tokens: the input that these become, `int64 [B, R]`; R is 1 without `versions`.
        positions: the input that grows by one, and by each draft that was accepted, `int64 [B]`:
            how many tokens came before.
        versions: the input that becomes the number of drafts that were accepted, `int64 [B]`; None
            for a method without drafts.
    """

    token: str
    tokens: str
    positions: str
    versions: str | None = None

    def describe(self) -> dict[str, str]:
        """The fields that are not None."""
        return {key: name for key, name in asdict(self).items() if name is not None}


@dataclass(frozen=True, kw_only=True)
class MethodGraph:
    """An exported method whose graph is made of `torch.ops.et_moe` ops and a few aten ops.

    Weights and state are inputs of the graph, not constants: it takes the tensors called `inputs`,
    then `state` (updated in place), then `weights`, and returns those called `outputs`. Names are
    what a runner binds by; the order is the graph's alone.

    One size may vary from call to call, in one dimension of an input, of several, and of outputs. A
    backend may pad such inputs with zeros, and gives back the beginning of such outputs. What is
    padding must not change the rest, so another input has to say how much is valid, or rows must
    not depend on each other.

    Attributes:
        state: the pool of each state tensor, one of `POOLS`, by name.
        hand_over: of a method that draws tokens, how the next call follows; None for any other
            method, whose outputs are just returned.

    Raises:
        ValueError: names that are not unique, that do not fit the graph in number, or a `hand_over`
            that names no tensor of its dtype and shape.
    """

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    state: dict[str, str] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    hand_over: HandOver | None = None

    def __post_init__(self) -> None:
        names = [*self.inputs, *self.state, *self.weights]
        for kind, given in (("inputs, state and weights", names), ("outputs", self.outputs)):
            if repeated := sorted({n for n in given if given.count(n) > 1}):
                raise ValueError(f"{kind} are not unique: {repeated}")
        for kind, given, found in (
            ("inputs", names, len(_placeholders(self.program))),
            ("outputs", self.outputs, len(self.program.graph.output_node().args[0])),
        ):
            if len(given) != found:
                raise ValueError(f"the graph has {found} {kind}, {len(given)} are named")
        if unknown := sorted(set(self.state.values()) - set(POOLS)):
            raise ValueError(f"state lies in {unknown}, expected {list(POOLS)}")
        if self.hand_over is not None:
            _check_hand_over(self, self.hand_over)

    def input_nodes(self) -> dict[str, Node]:
        """Placeholders by name, in the order of the graph: inputs, state, weights."""
        names = [*self.inputs, *self.state, *self.weights]
        return dict(zip(names, _placeholders(self.program), strict=True))

    def output_values(self) -> dict[str, torch.Tensor]:
        """Fake tensors of the results by name, in the order of the graph."""
        nodes = self.program.graph.output_node().args[0]
        return {name: n.meta["val"] for name, n in zip(self.outputs, nodes, strict=True)}

    def length(self) -> tuple[int, int]:
        """Smallest and largest value of the size that varies from call to call; (1, 1) if none.

        Raises:
            ValueError: more than one size varies.
        """
        nodes, found = self.input_nodes(), {}
        for name in self.inputs:
            for size in nodes[name].meta["val"].shape:
                if not isinstance(size, int):
                    found.setdefault(size.node.expr, (name, self.bounds(size)))
        if len(found) > 1:
            names = ", ".join(name for name, _ in found.values())
            raise ValueError(f"more than one size varies from call to call: of {names}")
        return next((bounds for _, bounds in found.values()), (1, 1))

    def bounds(self, size: int | torch.SymInt) -> tuple[int, int]:
        """Smallest and largest value of a dimension of the graph."""
        if isinstance(size, int):
            return size, size
        limits = self.program.range_constraints[size.node.expr]
        return int(limits.lower), int(limits.upper)


def _placeholders(program: ExportedProgram) -> list[Node]:
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [node for node in nodes if node.meta["val"] is not None]  # None: an absent option


def _check_hand_over(graph: MethodGraph, names: HandOver) -> None:
    inputs = {name: node.meta["val"] for name, node in graph.input_nodes().items()}
    inputs = {name: inputs[name] for name in graph.inputs}
    tokens = inputs.get(names.tokens)
    count = 1 if tokens is None or tokens.dim() == 0 else tokens.shape[0]
    rows, more = 1, []
    if names.versions is not None:
        rows = 1 if tokens is None or tokens.dim() < 2 else tokens.shape[1]
        more = [("input", names.versions, inputs, [count])]
    for kind, name, tensors, shape in (
        ("output", names.token, graph.output_values(), [count, rows + len(more)]),
        ("input", names.tokens, inputs, [count, rows]),
        ("input", names.positions, inputs, [count]),
        *more,
    ):
        if name not in tensors:
            raise ValueError(f"hand_over: the method has no {kind} {name}")
        value = tensors[name]
        if value.dtype != torch.int64 or [str(s) for s in value.shape] != [str(s) for s in shape]:
            found = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"hand_over: {kind} {name} is {found}, expected int64 {shape}")
