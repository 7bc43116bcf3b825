"""Qwen3.5 MoE as the pipeline sees it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from et_moe.backends.method_graph import HandOver
from et_moe.examples.qwen3_5_moe.config import DEFAULTS, ModelConfig, parse_config
from et_moe.examples.qwen3_5_moe.graph import Qwen3_5Moe
from et_moe.examples.qwen3_5_moe.presets import PRESETS, preset_files
from et_moe.examples.qwen3_5_moe.tensors import Tensors, inverse_frequencies, random_values
from et_moe.pipeline.models import Graph, Input, Method, Parts, PresetFiles, Random, Shapes
from et_moe.pipeline.storage import Precision

SAMPLING = (
    Input("temperature", torch.float32, (1,)),
    Input("top_k", torch.int64, (1,)),
    Input("top_p", torch.float32, (1,)),
    Input("seed", torch.int64, (1,)),
)


class Qwen3_5MoeModel:
    """See `et_moe.pipeline.models.Model`, which this implements."""

    parts: ClassVar[dict[str, str]] = {
        "embedding": "embedding",
        "attention": "linear",
        "linear_attention": "linear",
        "experts": "experts",
        "head": "linear",
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    prefixes = ("model.language_model.", "model.")
    skipped_prefixes = ("model.visual.", "visual.", "model.mtp.", "mtp.")
    tensors = Tensors()

    def parse_config(
        self, config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str
    ) -> ModelConfig:
        return parse_config(ModelConfig, DEFAULTS, config, generation, where)

    def checkpoint_shapes(self, config: ModelConfig, names: Collection[str] = ()) -> Shapes:
        return self.tensors.shapes(config, names)

    def part(self, name: str) -> str | None:
        return self.tensors.part(name)

    def groups(
        self, config: ModelConfig, names: Collection[str], read: Callable[[str], Tensor]
    ) -> Iterator[dict[str, Parts]]:
        return self.tensors.groups(config, names, read)

    def computed(self, config: ModelConfig, name: str) -> Tensor | None:
        return inverse_frequencies(config) if name.endswith(".inv_freq") else None

    def build(self, config: ModelConfig, precision: Precision) -> Graph:
        return Qwen3_5Moe(config, precision)

    def methods(self, config: ModelConfig, max_prefill_tokens: int) -> dict[str, Method]:
        position, outputs = Input("position", torch.int64, (1,)), ("token", "logits")
        prefill = (
            Input("tokens", torch.int64, (1, (2, max_prefill_tokens))),
            position,
            Input("num_tokens", torch.int64, (1,)),
            *SAMPLING,
        )
        decode = (Input("tokens", torch.int64, (1, 1)), position, *SAMPLING)
        return {
            "prefill": Method(prefill, outputs),
            "decode": Method(decode, outputs, HandOver("token", "tokens", "position")),
        }

    def random(self, name: str, shape: tuple[int, ...], std: float) -> Random:
        return random_values(name, shape, std)

    def preset_files(self, preset: str, text: dict[str, Any]) -> PresetFiles:
        return preset_files(preset, text)


MODEL = Qwen3_5MoeModel()
