"""The cost model's launch counts against the launches that the model really makes."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from et_moe.backends.cuda.compile import triton_ops
from et_moe.backends.cuda.triton.compile_case import record_launches
from et_moe.backends.cuda.triton.linear import prepack_linear
from et_moe.backends.cuda.triton.moe import prepack_experts
from et_moe.examples.qwen3_5_moe import model as qwen
from et_moe.examples.qwen3_5_moe.config import parse_config

SCRIPT = Path(__file__).resolve().parents[4] / "scripts" / "roofline.py"
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


@pytest.fixture(scope="module")
def roofline():
    spec = importlib.util.spec_from_file_location("roofline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["roofline"]


def prepacked_model(device: torch.device) -> qwen.Qwen3_5Moe:
    """A random model whose weights are in the kernels' layouts."""
    quantization = qwen.Quantization(group_size=32)
    model = qwen.Qwen3_5Moe(CONFIG, quantization, torch.float32).to(device)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=0.02)
        else:
            parameter.random_(0, 100)
    for module in model.modules():
        if isinstance(module, qwen.Linear):
            names, pack = ("weight", "scale"), prepack_linear
        elif isinstance(module, qwen.Experts):
            names, pack = ("w13", "w13_scale", "w2", "w2_scale"), prepack_experts
        else:
            continue
        packed = pack(*(getattr(module, n).data for n in names), 32)
        for name, tensor in zip(names, packed, strict=True):
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    return model


@pytest.mark.parametrize("tokens", [1, 18])
def test_launches(tokens, roofline, monkeypatch, device):
    monkeypatch.setattr(qwen, "et", SimpleNamespace(**triton_ops()))
    with torch.no_grad():
        model = prepacked_model(device)
    state = {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in model.state_spec(32).items()
    }

    def scalar(value, dtype=torch.int64):
        return torch.tensor([value], dtype=dtype, device=device)

    with torch.no_grad(), record_launches(run=True) as launches:
        token, logits = model(
            torch.randint(0, 300, (1, tokens), device=device),
            scalar(0),
            None if tokens == 1 else scalar(tokens),
            scalar(0.8, torch.float32),
            scalar(5),
            scalar(0.9, torch.float32),
            scalar(1),
            state,
        )
    assert 0 <= int(token) < 300 and torch.isfinite(logits).all()
    expected = roofline.model(tokens, CONFIG)
    assert len(launches) == len(expected), [x.name for x in launches]


def test_a_layer_of_decode_has_at_most_ten_launches(roofline):
    full = parse_config({"model_type": "qwen3_5_moe"})
    for kind in set(full.layer_types):
        assert len(roofline.layer(kind, 1, full, context=4096)) <= 10


def test_bytes_are_those_of_the_weights(roofline):
    """At one token nearly all that moves are the active weights of the published model."""
    full = parse_config({"model_type": "qwen3_5_moe"})
    moved = sum(kernel.bytes for kernel in roofline.model(1, full))
    weights = 2.94e9 * 4.125 / 8  # active weights at 4.125 bits
    state = 30 * 32 * 128 * 128 * 4 * 2  # recurrent states, read and written
    assert moved == pytest.approx(weights + state, rel=0.05)
    longer = dataclasses.replace(full, num_hidden_layers=80, layer_types=full.layer_types * 2)
    assert sum(k.bytes for k in roofline.model(1, longer)) > 1.8 * moved
