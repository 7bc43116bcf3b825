"""Shapes of random checkpoints of Qwen3-Next: a tiny one, and the published 80B.

The 80B's is https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct/blob/main/config.json.
"""

from typing import Any

from et_moe.examples.qwen3_5_moe.presets import COMMON, ROPE, TINY_SHAPE, tiny_files
from et_moe.pipeline.models import PresetFiles

ARCHITECTURE = "Qwen3NextForCausalLM"

_QWEN3_NEXT = COMMON | {
    "model_type": "qwen3_next",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3_NEXT | TINY_SHAPE | {"intermediate_size": 256},
    "80b": _QWEN3_NEXT
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "max_position_embeddings": 262144,
        "rope_parameters": ROPE,
        "eos_token_id": 151645,
    },
}


def preset_files(preset: str, text: dict[str, Any]) -> PresetFiles:
    """The files of a random checkpoint: "tiny" with a tokenizer, "80b" without."""
    if preset == "tiny":
        return tiny_files(ARCHITECTURE, text)
    stop = [text["eos_token_id"], 151643]
    return PresetFiles({"architectures": [ARCHITECTURE], **text}, {"eos_token_id": stop}, "model.")
