"""Checkpoints that arrive quantized, against Hugging Face with the weights they stand for."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import COMPRESSED_TENSORS, GPTQ, to_compressed_tensors, to_gptq, write
from safetensors.torch import load_file
from test_parity import BASE, NEW_TOKENS, greedy_tokens, random_prompt
from test_w4a8 import eager_logits
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.models import model_of
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import choose_storages

EXPERTS = tuple(f"{p}_proj.weight" for p in ("gate", "up", "down"))


def _save(model, config: dict, folder: Path, make, section: dict) -> Path:
    """Saves a model with quantized experts, and gives the model the weights they stand for."""
    model.save_pretrained(folder / "float")
    tensors = {n: t.clone() for n, t in load_file(folder / "float" / "model.safetensors").items()}
    stored, meant = make(tensors, EXPERTS)
    state = model.state_dict()
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if kind in ("gate_up_proj", "down_proj") and module.endswith("experts"):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for e, rows in enumerate(tensor):
                rows.copy_(torch.cat([meant[f"{module}.{e}.{p}.weight"] for p in parts]))
        elif name in meant:
            tensor.copy_(meant[name])
    return write(folder / "quantized", config | {"quantization_config": section}, stored)


@pytest.fixture(scope="module", params=["gptq", "compressed-tensors"])
def case(request, tmp_path_factory):
    """A Hugging Face model with dequantized experts, and its quantized checkpoint."""
    make, section = {
        "gptq": (to_gptq, GPTQ),
        "compressed-tensors": (to_compressed_tensors, COMPRESSED_TENSORS),
    }[request.param]
    config = Qwen3_5MoeTextConfig(
        **BASE | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
        num_hidden_layers=2,
        pad_token_id=0,
    )
    torch.manual_seed(4)
    model = Qwen3_5MoeForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(2.5)
        model.save_pretrained(folder / "config")
        content = json.loads((folder / "config" / "config.json").read_text())
        directory = _save(model, content, folder, make, section)
    return model, Checkpoint(directory), folder


def test_greedy_tokens_equal_hugging_face(case, runner) -> None:
    """Dense parts stay as they are and activations are fp32: only the last bits of sums differ."""
    model, checkpoint, folder = case
    parts = model_of(checkpoint.config).parts
    source = QuantizedCheckpoint(checkpoint, choose_storages(parts, "none", 32, "none"))
    options = ExportOptions(dtype=torch.float32, activation_dtype="bf16")
    export(source, folder / "program", options)
    for length in (1, 7, 65):
        prompt = random_prompt(model, length)
        expected = greedy_tokens(model, prompt)
        assert runner.generate(folder / "program", prompt[0].tolist(), NEW_TOKENS) == expected


def test_logits_with_int8_activations(case, runner) -> None:
    """The other parts become INT4 with bfloat16 scales, as the flags say by default."""
    _, checkpoint, folder = case
    parts = model_of(checkpoint.config).parts
    source = QuantizedCheckpoint(checkpoint, choose_storages(parts, "4w", 32))
    export(source, folder / "w4a8", ExportOptions(max_seq_len=64))
    ids = torch.randint(0, 199, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = eager_logits(source, torch.float32, ids)
    logits = runner.logits(folder / "w4a8", ids)
    assert (logits - expected).norm() / expected.norm() < 1e-3
