"""Method graphs and what a program says of them."""

import json

import pytest
import torch
from torch.export import Dim

from et_moe.backends.bindings import describe_method, get_bindings, tensor_spec
from et_moe.backends.method_graph import PAGES, SLOTS, HandOver, MethodGraph

HAND_OVER = HandOver("token", "tokens", "positions")


class Count(torch.nn.Module):
    """A method with all that a method can have."""

    def forward(self, tokens, positions, cache, weight):
        cache.add_(1)
        scores = tokens[:, :1] * weight + positions + cache.sum()
        return scores, tokens[:, :1] + 1


def graph(tokens: int = 1, dtype: torch.dtype = torch.int64, **changes) -> MethodGraph:
    example = (torch.zeros((1, tokens), dtype=dtype), torch.zeros(1, dtype=torch.int64))
    example += (torch.zeros(3), torch.zeros((1, 3)))
    length = {1: Dim("T", min=2, max=16)} if tokens > 1 else None
    pool = {0: Dim("P", min=1, max=99)}
    program = torch.export.export(Count(), example, dynamic_shapes=(length, None, pool, None))
    names = {
        "inputs": ["tokens", "positions"],
        "outputs": ["scores", "token"],
        "state": {"cache": SLOTS},
        "weights": ["weight"],
        "hand_over": HAND_OVER if tokens == 1 else None,
    }
    return MethodGraph(program=program, **{**names, **changes})


def test_description() -> None:
    assert describe_method(graph(8), first_output=1) == {
        "inputs": [
            {"name": "tokens", "dtype": "int64", "shape": [1, 16], "min_shape": [1, 2]},
            {"name": "positions", "dtype": "int64", "shape": [1]},
        ],
        "outputs": [
            {"name": "scores", "dtype": "float32", "shape": [1, 3], "index": 1},
            {"name": "token", "dtype": "int64", "shape": [1, 1], "index": 2},
        ],
        "hand_over": None,
    }
    assert describe_method(graph())["hand_over"] == HAND_OVER.describe()


class Rows(torch.nn.Module):
    """Two inputs and an output whose first dimension varies, and perhaps one more."""

    def forward(self, tokens, positions, others):
        return tokens + positions[:, None], others[:1]


def rows(**lengths: Dim) -> MethodGraph:
    sizes = {"tokens": (8, 1), "positions": (8,), "others": (8,)}
    example = tuple(torch.zeros(size, dtype=torch.int64) for size in sizes.values())
    shapes = tuple({0: lengths[n]} if n in lengths else None for n in sizes)
    program = torch.export.export(Rows(), example, dynamic_shapes=shapes)
    return MethodGraph(program=program, inputs=list(sizes), outputs=["sums", "first"])


def test_one_size_may_vary() -> None:
    size = Dim("B", min=2, max=64)
    assert graph().length() == (1, 1) and graph(8).length() == (2, 16)
    assert rows(tokens=size, positions=size).length() == (2, 64)
    two = rows(tokens=size, positions=size, others=Dim("C", min=3, max=9))
    with pytest.raises(ValueError, match=r"more than one size varies .*: of tokens, others"):
        two.length()


def test_bindings_name_state_and_weights_once() -> None:
    graphs = {"prefill": graph(8), "decode": graph()}
    weights = {"weight": (torch.int8, (6, 3))}
    bindings = json.loads(get_bindings(graphs, weights, {"prefill": 1, "decode": 0}))
    cache = {"name": "cache", "dtype": "float32", "shape": [99], "min_shape": [1]}
    assert bindings["state"] == [cache | {"pool": "slots"}]
    assert bindings["weights"] == [{"name": "weight", "dtype": "int8", "shape": [6, 3]}]
    for name, first in (("prefill", 1), ("decode", 0)):
        assert bindings["methods"][name] == describe_method(graphs[name], first)


def test_methods_must_agree() -> None:
    for other in (
        graph(state={"other": SLOTS}),
        graph(state={"cache": PAGES}),
        graph(weights=["other"]),
    ):
        graphs = {"prefill": graph(8), "decode": other}
        spec = tensor_spec(graphs["prefill"], ["weight"])
        with pytest.raises(ValueError, match="differ in state or weights"):
            get_bindings(graphs, spec, dict.fromkeys(graphs, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": {"cache": SLOTS, "another": SLOTS}}, "the graph has 4 inputs, 5 are named"),
        ({"outputs": ["token"]}, "the graph has 2 outputs, 1 are named"),
        ({"weights": ["tokens"]}, r"inputs, state and weights are not unique: \['tokens'\]"),
        ({"outputs": ["token", "token"]}, r"outputs are not unique: \['token'\]"),
        ({"hand_over": HandOver("next", "tokens", "positions")}, "no output next"),
        ({"hand_over": HandOver("token", "cache", "positions")}, "no input cache"),
        (
            {"hand_over": HandOver("scores", "tokens", "positions")},
            r"output scores is torch.float32 \[1, 3\], expected int64 \[1, 1\]",
        ),
        ({"dtype": torch.int32}, r"output token is torch.int32 \[1, 1\], expected int64 \[1, 1\]"),
        (
            {"tokens": 8, "hand_over": HAND_OVER},
            r"input tokens is torch.int64 \[1, s\w+\], expected int64 \[1, 1\]",
        ),
        ({"state": {"cache": "heap"}}, r"state lies in \['heap'\], expected \['pages', 'slots'\]"),
    ],
)
def test_names_must_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph(**changes)
