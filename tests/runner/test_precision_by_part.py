"""Programs whose parts are stored in different ways, against Hugging Face with the weights that
they stand for."""

from pathlib import Path

import pytest
import torch
from test_parity import BASE, NEW_TOKENS, greedy_tokens, random_prompt
from test_w4a8 import eager_logits
from transformers import (
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from et_moe.backends import ops
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.models import model_of
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Int4, Int8PerRow, Storage, choose_storages

SIZES = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
MODELS = {
    "qwen3_5": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, {}),
    "qwen3_next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        {"intermediate_size": 96, "mlp_only_layers": [0]},
    ),
}
FLAGS = {
    "mixed": {"recipe": "mixed"},
    "dense": {"recipe": "dense"},
    "4w": {"recipe": "4w"},
    "int8_experts": {"recipe": "mixed", "by_part": {"experts": "8w", "attention": "none"}},
    "dense_experts": {"recipe": "4w", "by_part": {"experts": "none", "shared_expert": "8w"}},
    "int4_embedding": {"recipe": "4w", "qembedding": "4w"},
    "apart": {
        "qlinear": "none",
        "by_part": {"attention": "8w", "linear_attention": "4w", "shared_expert": "4w"},
        "qembedding": "none",
    },
}


def multiply_out(weight: torch.Tensor, storage: Storage) -> torch.Tensor:
    """The values that a stored weight stands for."""
    if isinstance(storage, Int4):
        return ops.dequantize_w4(*ops.quantize_w4(weight, storage.group_size), storage.group_size)
    if isinstance(storage, Int8PerRow):
        values, scale = ops.quantize_w8(weight)
        return values.float() * scale.float()
    return weight


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Random Hugging Face checkpoints."""
    folders = {}
    for name, (make_config, make_model, changes) in MODELS.items():
        config = make_config(**BASE | SIZES | changes, num_hidden_layers=2, pad_token_id=0)
        torch.manual_seed(3)
        model = make_model(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(2.5)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def reference(make_model, source: QuantizedCheckpoint):
    """Hugging Face's model with the weights that the source stands for."""
    model = make_model.from_pretrained(source.directory, dtype=torch.float32).eval()
    part = model_of(source.config).part
    with torch.no_grad():
        for name, weight in model.named_parameters():
            found = part(name.removeprefix("model."))
            if found is not None:
                weight.copy_(multiply_out(weight, source.storages[found]))
    return model


def quantized(directory: Path, flags: dict) -> QuantizedCheckpoint:
    checkpoint = Checkpoint(directory)
    parts = model_of(checkpoint.config).parts
    return QuantizedCheckpoint(checkpoint, choose_storages(parts, group_size=32, **flags))


@pytest.mark.parametrize(
    ("model", "flags"), [*(("qwen3_5", flags) for flags in FLAGS), ("qwen3_next", "mixed")]
)
def test_greedy_tokens_equal_hugging_face(
    checkpoints, runner, tmp_path: Path, model: str, flags: str
) -> None:
    """Activations stay in fp32, so only the last bits of sums differ."""
    source = quantized(checkpoints[model], FLAGS[flags])
    export(source, tmp_path, ExportOptions(activation_dtype="bf16", max_sequences=1))
    expected = reference(MODELS[model][1], source)
    for length in (1, 65):
        prompt = random_prompt(expected, length)
        tokens = runner.generate(tmp_path, prompt[0].tolist(), NEW_TOKENS)
        assert tokens == greedy_tokens(expected, prompt)


def test_logits_with_int8_activations(checkpoints, runner, tmp_path: Path) -> None:
    source = quantized(checkpoints["qwen3_5"], FLAGS["mixed"])
    export(source, tmp_path, ExportOptions(max_seq_len=64, max_sequences=1))
    ids = torch.randint(0, 199, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = eager_logits(source, torch.float32, ids)
    logits = runner.logits(tmp_path, ids)
    # Where a value falls on the border of two INT8 steps, the last bit of a sum decides.
    assert (logits - expected).norm() / expected.norm() < 1e-3
