"""Shapes of random checkpoints: a tiny one, and the published 35B.

The 35B's is https://huggingface.co/Qwen/Qwen3.5-35B-A3B/blob/main/config.json, language model only.
"""

from typing import Any

from et_moe.examples.qwen3_5_moe.config import DEFAULTS
from et_moe.examples.qwen3_5_moe.tokenizer import (
    END_OF_TEXT,
    IM_END,
    added_token_ids,
    tokenizer_json,
)
from et_moe.pipeline.models import PresetFiles

ROPE = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}

COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_cache": True,
    "full_attention_interval": 4,
    "mtp_num_hidden_layers": 0,
    "rope_parameters": ROPE,
}

TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "max_position_embeddings": 4096,
}

_QWEN3_5 = COMMON | {
    "model_type": "qwen3_5_moe_text",
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3_5 | TINY_SHAPE,
    # The published shape is what Hugging Face's configuration assumes.
    "35b": _QWEN3_5
    | DEFAULTS
    | {
        "max_position_embeddings": 262144,
        "rope_parameters": ROPE | {"mrope_section": [11, 11, 10], "mrope_interleaved": True},
        "eos_token_id": 248044,
    },
}


def tiny_files(architecture: str, text: dict[str, Any]) -> PresetFiles:
    """A text model's files, with tensors under `model.` and a tokenizer of a token per byte.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's.
    """
    tokenizer = tokenizer_json()
    ids = added_token_ids(tokenizer)
    if text["vocab_size"] <= max(ids.values()):
        raise ValueError(
            f"vocab_size {text['vocab_size']}: expected at least {max(ids.values()) + 1}, "
            "the tokens of the byte tokenizer"
        )
    config = {"architectures": [architecture], **text, "eos_token_id": ids[END_OF_TEXT]}
    stop = [ids[IM_END], ids[END_OF_TEXT]]
    return PresetFiles(config, {"eos_token_id": stop}, "model.", tokenizer)


def preset_files(preset: str, text: dict[str, Any]) -> PresetFiles:
    """The files of a random checkpoint.

    "tiny" has the plain text config; "35b" the published multimodal form, `text_config` inside and
    tensors under `model.language_model.`, without vision weights and without a tokenizer.
    """
    if preset == "tiny":
        return tiny_files("Qwen3_5MoeForCausalLM", text)
    im_end, end = 248046, text["eos_token_id"]
    stop = [im_end, end] if im_end < text["vocab_size"] else [end]
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
    }
    return PresetFiles(config, {"eos_token_id": stop}, "model.language_model.")
