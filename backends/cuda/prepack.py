"""Brings weights into the order that the kernels read: which ones, to what shapes, and how."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.fx import Node

from et_moe.backends.cuda.graphs import op_arguments
from et_moe.backends.cuda.triton.linear import layout as linear
from et_moe.backends.cuda.triton.moe import layout as moe
from et_moe.backends.method_graph import MethodGraph

Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class _Packer:
    """How weights of an op are prepacked.

    Attributes:
        arguments: names of the op's arguments that are prepacked together.
        pack: `pack(*arguments)`, and behind them the op's group size if it has one, returns the
            tensors that take the arguments' places.
    """

    arguments: tuple[str, ...]
    pack: Callable[..., tuple[torch.Tensor, ...]]


_EXPERTS = _Packer(("w13", "w13_scale", "w2", "w2_scale"), moe.prepack_experts)
_EXPERTS_W8 = _Packer(("w13", "w13_scale", "w2", "w2_scale"), moe.prepack_experts_w8)
_LINEAR = _Packer(("weight", "scale"), linear.prepack_linear)
_PACKERS = {
    "moe": _Packer(("w13", "w2"), moe.prepack_experts_dense),
    "moe_w4a8": _EXPERTS,
    "moe_w4a16": _EXPERTS,
    "moe_w8a8": _EXPERTS_W8,
    "moe_w8a16": _EXPERTS_W8,
    "linear_w4a8": _LINEAR,
    "linear_w4a16": _LINEAR,
}

PREPACK_VERSION = f"experts-{moe.LAYOUT_VERSION}.linear-{linear.LAYOUT_VERSION}"
"""Names the versions of the layouts; code and weights fit only if it is the same for both."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """Weights of one call of an op that are prepacked together, by name; `dtypes` in the graph."""

    packer: _Packer
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    group_size: int | None

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The prepacked tensors, by name; floats are cast to the graph's dtype."""
        sources = [
            tensors[name].to(dtype) if dtype.is_floating_point else tensors[name]
            for name, dtype in zip(self.names, self.dtypes, strict=True)
        ]
        sizes = () if self.group_size is None else (self.group_size,)
        return dict(zip(self.names, self.packer.pack(*sources, *sizes), strict=True))


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """What becomes of each weight of a bundle.

    Attributes:
        spec: name -> (dtype, shape) of the tensors in the `.ptd`, in the order of the graphs'
            weights. The names are those of the bundle.
        layout: names the order of their elements; the `.ptd` has it, too.
    """

    spec: Spec
    _groups: dict[str, _Group]
    layout: str = PREPACK_VERSION

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Prepacks tensors of a bundle, in the order of `spec`; one prepacked group in memory.

        Args:
            tensors: by name; with one tensor of an op's weight all of them (weight and scale).

        Raises:
            ValueError: a tensor of a group is missing, or has another shape than the graphs say.
        """
        ready: dict[str, torch.Tensor] = {}
        for name in [name for name in self.spec if name in tensors]:
            group = self._groups.get(name)
            if group is None:
                ready[name] = tensors[name].to(self.spec[name][0])
            elif name not in ready:
                if missing := [n for n in group.names if n not in tensors]:
                    raise ValueError(f"{name} is prepacked together with {missing[0]}: not given")
                ready |= group.pack(tensors)
            tensor, (dtype, shape) = ready.pop(name), self.spec[name]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"{name}: prepacked to {found}, expected {dtype} {shape}")
            yield name, tensor


def _find_groups(graph: MethodGraph, weights: Mapping[Node, str]) -> Iterator[_Group]:
    for node in graph.program.graph.nodes:
        if getattr(node.target, "namespace", None) != "et_moe":
            continue
        packer = _PACKERS.get(node.target._opname)
        if packer is None:
            continue
        arguments = op_arguments(node)
        sources = [arguments[name] for name in packer.arguments]
        if unknown := [str(n) for n in sources if n not in weights]:
            raise ValueError(f"{node.name}: {unknown[0]} is not a weight of the method")
        names = tuple(weights[n] for n in sources)
        dtypes = tuple(n.meta["val"].dtype for n in sources)
        yield _Group(packer, names, dtypes, arguments.get("group_size"))


def plan_weights(graphs: Mapping[str, MethodGraph]) -> WeightPlan:
    """Walks the graphs for weights that kernels want in another order.

    Args:
        graphs: methods by name; weights of the same name are the same tensor.

    Raises:
        ValueError: methods differ in a weight, or two ops want the same weight in different orders.
    """
    spec: Spec = {}
    groups: dict[str, _Group] = {}
    meta: dict[str, torch.Tensor] = {}
    for method, graph in graphs.items():
        inputs = graph.input_nodes()
        nodes = {name: inputs[name] for name in graph.weights}
        for name, node in nodes.items():
            value = node.meta["val"]
            entry = (value.dtype, tuple(value.shape))
            if spec.setdefault(name, entry) != entry:
                raise ValueError(f"{method}: weight {name} is {entry}, elsewhere {spec[name]}")
            meta[name] = torch.empty(entry[1], dtype=entry[0], device="meta")
        for group in _find_groups(graph, {node: name for name, node in nodes.items()}):
            for name in group.names:
                if groups.setdefault(name, group) != group:
                    raise ValueError(f"{method}: two ops want weight {name} in different orders")
    for group in dict.fromkeys(groups.values()):
        for name, tensor in group.pack(meta).items():
            spec[name] = (tensor.dtype, tuple(tensor.shape))
    return WeightPlan(spec, groups)
