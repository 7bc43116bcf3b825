"""Qwen3-Next (`Qwen3NextForCausalLM`) as the pipeline sees it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from et_moe.examples.qwen3_5_moe.model import Qwen3_5MoeModel
from et_moe.examples.qwen3_5_moe.mtp import build
from et_moe.examples.qwen3_next.config import ModelConfig, parse_config
from et_moe.examples.qwen3_next.graph import Qwen3NextLayer
from et_moe.examples.qwen3_next.presets import PRESETS, preset_files
from et_moe.examples.qwen3_next.tensors import Qwen3NextTensors
from et_moe.pipeline.models import Graph, PresetFiles
from et_moe.pipeline.storage import Precision


class Qwen3NextModel(Qwen3_5MoeModel):
    """Qwen3.5 with another projection in front of the delta rule, and dense layers."""

    parts: ClassVar[dict[str, str]] = Qwen3_5MoeModel.parts | {"dense_mlp": "linear"}
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    prefixes = ("model.",)
    skipped_prefixes = ()
    tensors = Qwen3NextTensors()

    def parse_config(
        self, config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str
    ) -> ModelConfig:
        return parse_config(config, generation, where)

    def build(self, config: ModelConfig, precision: Precision) -> Graph:
        return build(config, precision, Qwen3NextLayer)

    def preset_files(self, preset: str, text: dict[str, Any]) -> PresetFiles:
        return preset_files(preset, text)


MODEL = Qwen3NextModel()
