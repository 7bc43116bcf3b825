"""The cost model's launch counts against the launches that the model really makes."""

import copy
import dataclasses

import pytest
import torch
from checkpoints import storages
from torch.fx import GraphModule

from et_moe.backends.cuda.fusion import fuse
from et_moe.backends.cuda.prepack import plan_weights
from et_moe.backends.cuda.triton.cases.launches import Launch, record_launches
from et_moe.backends.cuda.triton.linear.layout import prepack_linear
from et_moe.backends.cuda.triton.linear.op import linear_w4a8
from et_moe.backends.cuda.triton.table import TRITON_OPS
from et_moe.benchmarks import roofline
from et_moe.pipeline.graphs import build_graphs
from et_moe.pipeline.models import Sizes, parse_config
from et_moe.pipeline.storage import Precision

CONFIG = parse_config(
    {
        "model_type": "qwen3_5_moe",
        "vocab_size": 300,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts_per_tok": 2,
        "num_experts": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
)


def launches(method: str, tokens: int) -> list[Launch]:
    """The kernels that a method's graph launches for some tokens."""
    graphs = build_graphs(
        CONFIG, Precision(storages(group_size=32), dtype=torch.float32), Sizes(32, 32, 1)
    )
    graph, spec = copy.deepcopy(graphs[method].program.graph), plan_weights(graphs).spec
    values = {}
    for name, node in graphs[method].input_nodes().items():
        dtype, shape = spec.get(name, (node.meta["val"].dtype, node.meta["val"].shape))
        if name == "tokens":
            shape = (1, tokens)
        elif name in graphs[method].state:
            shape = (1, *shape[1:])
        values[node.name] = torch.zeros(shape, dtype=dtype)
        if name == "num_tokens":
            values[node.name].fill_(tokens)
    fuse(graph)
    for node in graph.nodes:
        if getattr(node.target, "namespace", None) == "et_moe":
            node.target = TRITON_OPS[node.target._opname]
    inputs = [values.get(node.name) for node in graph.nodes if node.op == "placeholder"]
    with record_launches() as recorded:
        GraphModule(torch.nn.Module(), graph)(*inputs)
    return recorded


@pytest.mark.parametrize(("method", "tokens"), [("decode", 1), ("prefill", 18)])
def test_launches(method, tokens):
    recorded = launches(method, tokens)
    assert len(recorded) == len(roofline.model(tokens, CONFIG)), [x.name for x in recorded]


def test_a_layer_of_decode_has_at_most_ten_launches():
    full = parse_config({"model_type": "qwen3_5_moe"})
    for kind in set(full.layer_types):
        assert len(roofline.layer(kind, 1, full, context=4096)) <= 10


@pytest.mark.parametrize("k", [128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384])
def test_a_row_of_any_length_launches_what_it_costs(k):
    """The matrix-vector kernel takes rows of some lengths only, up to 8192 columns."""
    device, n = torch.device("meta"), 64
    weight = torch.empty((n, k // 2), dtype=torch.uint8, device=device)
    scale = torch.empty((n, k // 128), dtype=torch.bfloat16, device=device)
    x = torch.empty((1, k), dtype=torch.bfloat16, device=device)
    with record_launches() as recorded:
        linear_w4a8(x, *prepack_linear(weight, scale, 128), 128)
    assert len(recorded) == len(roofline.linear("x", 1, k, n, residual=False))


def test_bytes_are_those_of_the_weights():
    """For one token nearly all bytes are those of the active weights of the published model."""
    full = parse_config({"model_type": "qwen3_5_moe"})
    moved = sum(kernel.bytes for kernel in roofline.model(1, full))
    weights = 2.94e9 * 4.125 / 8  # active weights at 4.125 bits
    state = 30 * 32 * 128 * 128 * 4 * 2  # recurrent states, read and written
    assert moved == pytest.approx(weights + state, rel=0.05)
    longer = dataclasses.replace(full, num_hidden_layers=80, layer_types=full.layer_types * 2)
    assert sum(k.bytes for k in roofline.model(1, longer)) > 1.8 * moved
