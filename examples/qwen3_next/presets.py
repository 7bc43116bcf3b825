"""Shapes of random checkpoints of Qwen3-Next: a tiny one, and the published 80B.

The 80B's is https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct/blob/main/config.json.
"""

from typing import Any

from et_moe.examples.qwen3_5_moe.presets import COMMON, ROPE, TINY_SHAPE, tiny_files
from et_moe.examples.qwen3_next.config import DEFAULTS
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
    | DEFAULTS
    | {
        "intermediate_size": 5120,
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
