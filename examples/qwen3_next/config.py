"""The configuration of Qwen3-Next: Qwen3.5's, with layers that may have a dense MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from et_moe.examples.qwen3_5_moe import config as qwen3_5_moe
from et_moe.pipeline.config import ConfigError

# What Hugging Face's Qwen3NextConfig assumes of a key that config.json leaves out.
DEFAULTS: dict[str, Any] = qwen3_5_moe.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


@dataclass(frozen=True)
class ModelConfig(qwen3_5_moe.ModelConfig):
    """The model's shape; field names are those of Hugging Face's `Qwen3NextConfig`.

    Attributes:
        intermediate_size: width of a dense MLP.
        norm_topk_prob: whether the chosen experts' probabilities are made to add up to 1.
        decoder_sparse_step: layers i for which it divides i + 1 have a mixture of experts.
        mlp_only_layers: layers that have a dense MLP all the same.
    """

    model_type: ClassVar[str] = "qwen3_next"
    # Published checkpoints have the head, but no key for it; vLLM (`config/speculative.py`) assumes
    # one layer, too. A checkpoint without its tensors has none.
    default_mtp_layers: ClassVar[int] = 1
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts, not a dense MLP; that of the MTP head has."""
        if layer == self.num_hidden_layers:
            return True
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def parse_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str
) -> ModelConfig:
    """Reads a configuration as `qwen3_5_moe.config.parse_config` does, and raises as it does."""
    raw = qwen3_5_moe.text_config(config, where)
    layers = raw.get("mlp_only_layers")
    layers = [] if layers is None else layers
    valid = isinstance(layers, list) and all(type(i) is int and i >= 0 for i in layers)
    if not valid:
        expected = "expected a list of layer numbers"
        raise ConfigError(f"{where}: mlp_only_layers is {layers!r}, {expected}")
    return qwen3_5_moe.parse_config(
        ModelConfig, DEFAULTS, config, generation, where, mlp_only_layers=tuple(layers)
    )
