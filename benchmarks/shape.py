"""The model whose shape is measured."""

from pathlib import Path

from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.models import load_config, parse_config


def model_shape(model_dir: Path | None = None) -> ModelConfig:
    """The shape in a folder's config.json, or that of Qwen3.5-35B-A3B."""
    return load_config(model_dir) if model_dir else parse_config({"model_type": "qwen3_5_moe"})
