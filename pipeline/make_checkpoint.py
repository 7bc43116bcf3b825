"""Random Qwen3.5 MoE checkpoints in Hugging Face layout: a tiny one, and the published 35B shape.

Initial values follow transformers' modeling_qwen3_5_moe.py; the 35B shape is
https://huggingface.co/Qwen/Qwen3.5-35B-A3B/blob/main/config.json, language model only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from et_moe.pipeline.checkpoint import expected_shapes
from et_moe.pipeline.config import parse_config
from et_moe.pipeline.hf_tokenizer import (
    END_OF_TEXT,
    IM_END,
    added_token_ids,
    tokenizer_json,
    write_tokenizer,
)
from et_moe.pipeline.safetensors_stream import SafetensorsWriter

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_ELEMENTS = 1 << 22
THREADS = min(16, len(os.sched_getaffinity(0)))
DTYPE = torch.bfloat16

_COMMON: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_cache": True,
    "full_attention_interval": 4,
}

# text_config of each preset; `layer_types` follows from the number of layers.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _COMMON
    | {
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
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "35b": _COMMON
    | {
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        "eos_token_id": 248044,
    },
}


def make_checkpoint(
    output_dir: Path,
    preset: str = "tiny",
    seed: int = 0,
    layers: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Write a random bfloat16 checkpoint: config.json, generation_config.json and weight shards.

    "tiny" has the plain text config, tensors under `model.`, and a tokenizer of a token per byte.
    "35b" has the published multimodal form, `text_config` inside and tensors under
    `model.language_model.`, without vision weights and without a tokenizer: 69 GB at its 40 layers.
    Memory stays below 3 GB for any number of layers. A tensor's values depend on the seed, its name
    and its shape alone, so checkpoints that differ in `layers` agree in the layers they share.

    Args:
        output_dir: directory to make; it appears only when complete.
        preset: a key of PRESETS.
        seed: of all weights.
        layers: keep only this many layers from the front.
        overrides: replacements for values of the preset's text config, and `layer_types`.

    Raises:
        ValueError: an unknown preset or key of `overrides`, a value that makes no model, or
            `layers` out of range.
        FileExistsError: `output_dir` exists and is not an empty directory.
        OSError: writing failed; nothing is left.
    """
    output_dir = Path(output_dir)
    text = text_config(preset, layers, overrides)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir}: exists and is not an empty directory")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_dir.with_name(f"{output_dir.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        if preset == "tiny":
            tokenizer = tokenizer_json()
            write_tokenizer(tokenizer, temporary, text["max_position_embeddings"])
            ids = added_token_ids(tokenizer)
            if text["vocab_size"] <= max(ids.values()):
                raise ValueError(
                    f"vocab_size {text['vocab_size']}: expected at least {max(ids.values()) + 1}, "
                    "the tokens of the byte tokenizer"
                )
            text["eos_token_id"] = ids[END_OF_TEXT]
            stop = [ids[IM_END], ids[END_OF_TEXT]]
            config = {"architectures": ["Qwen3_5MoeForCausalLM"], **text}
            prefix = "model."
        else:
            im_end, end = 248046, text["eos_token_id"]
            stop = [im_end, end] if im_end < text["vocab_size"] else [end]
            config = {
                "architectures": ["Qwen3_5MoeForConditionalGeneration"],
                "model_type": "qwen3_5_moe",
                "tie_word_embeddings": text["tie_word_embeddings"],
                "text_config": text,
            }
            prefix = "model.language_model."
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", {"eos_token_id": stop})
        _write_weights(temporary, tensor_shapes(text, prefix), seed, text["initializer_range"])
        os.rename(temporary, output_dir)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(output_dir)  # of the temporary files nothing is left
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def text_config(
    preset: str, layers: int | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The text config that `make_checkpoint` writes for these arguments; raises as it does."""
    overrides = overrides or {}
    if preset not in PRESETS:
        raise ValueError(f"preset '{preset}': expected one of {', '.join(PRESETS)}")
    for key in overrides:
        if key not in PRESETS[preset] and key != "layer_types":
            raise ValueError(f"overrides: '{key}' is not a key of the '{preset}' text config")
    text = PRESETS[preset] | overrides
    if "layer_types" not in text:
        text["layer_types"] = [
            "linear_attention" if (i + 1) % text["full_attention_interval"] else "full_attention"
            for i in range(text["num_hidden_layers"])
        ]
    text["num_hidden_layers"] = len(text["layer_types"])
    if layers is not None:
        if not 1 <= layers <= text["num_hidden_layers"]:
            raise ValueError(f"layers {layers}: expected 1 to {text['num_hidden_layers']}")
        text["layer_types"] = text["layer_types"][:layers]
        text["num_hidden_layers"] = layers
    return text


def tensor_shapes(text: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with this text config."""
    shapes = expected_shapes(parse_config(text), fused_experts=True)
    return {
        name if name == "lm_head.weight" else prefix + name: shape for name, shape in shapes.items()
    }


def _random_chunk(
    name: str, shape: tuple[int, ...], seed: int, initializer_range: float, begin: int, end: int
) -> Tensor:
    """Rows [begin, end) of a tensor, bfloat16; seeded by themselves, so any thread makes them."""
    digest = hashlib.sha256(f"{seed}:{name}:{begin}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(end - begin, *shape[1:])
    if name.endswith(".A_log"):
        values.uniform_(0.01, 16.0, generator=generator).log_()
    elif name.endswith(".dt_bias"):
        values.fill_(1.0)
    elif name.endswith("linear_attn.norm.weight"):
        values.normal_(1.0, 0.05, generator=generator)
    elif name.endswith("norm.weight"):  # zero-centred: the layer multiplies by 1 + weight
        values.normal_(0.0, 0.05, generator=generator)
    elif name.endswith(".conv1d.weight"):  # keeps the scale of its input, as trained ones do
        values.normal_(0.0, shape[-1] ** -0.5, generator=generator)
    else:
        values.normal_(0.0, initializer_range, generator=generator)
    return values.to(DTYPE)


def _random_chunks(
    pool: ThreadPoolExecutor,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    initializer_range: float,
) -> Iterator[Tensor]:
    """A tensor in pieces along dimension 0, of CHUNK_ELEMENTS or one row, THREADS in memory."""
    rows = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
    begins = range(0, shape[0], rows)
    for group in (begins[i : i + THREADS] for i in range(0, len(begins), THREADS)):
        yield from pool.map(
            lambda begin: _random_chunk(
                name, shape, seed, initializer_range, begin, min(begin + rows, shape[0])
            ),
            group,
        )


def _write_weights(
    directory: Path, shapes: dict[str, tuple[int, ...]], seed: int, initializer_range: float
) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    shard_bytes = total_bytes = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPE.itemsize
        if shards[-1] and shard_bytes + size > MAX_SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = shape
        shard_bytes += size
        total_bytes += size

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries = {name: (DTYPE, shape) for name, shape in shard.items()}
            with SafetensorsWriter(directory / file, entries, {"format": "pt"}) as writer:
                for name, shape in shard.items():
                    chunks = _random_chunks(pool, name, shape, seed, initializer_range)
                    writer.write_chunks(name, chunks)
            weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
