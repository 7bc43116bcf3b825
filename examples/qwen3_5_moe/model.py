"""Qwen3.5 MoE as the pipeline sees it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from et_moe.backends.method_graph import HandOver
from et_moe.examples.qwen3_5_moe.config import DEFAULTS, ModelConfig, parse_config
from et_moe.examples.qwen3_5_moe.graph import DecoderLayer, is_joined
from et_moe.examples.qwen3_5_moe.mtp import build
from et_moe.examples.qwen3_5_moe.presets import PRESETS, preset_files
from et_moe.examples.qwen3_5_moe.tensors import Tensors, inverse_frequencies, random_values
from et_moe.pipeline.models import (
    Graph,
    Input,
    Method,
    Parts,
    PresetFiles,
    Random,
    Range,
    Shapes,
    Sizes,
)
from et_moe.pipeline.storage import Precision, Storages


def make_inputs(sequences: int | Range, rows: int | Range, sizes: Sizes) -> tuple[Input, ...]:
    """The inputs of a method that takes so many sequences with so many rows each."""
    per_sequence = (sequences,)
    versions = (Input("versions", torch.int64, per_sequence),) if sizes.draft_tokens else ()
    return (
        Input("tokens", torch.int64, (sequences, rows)),
        Input("positions", torch.int64, per_sequence),
        Input("slots", torch.int32, per_sequence),
        Input("pages", torch.int32, (sequences, sizes.max_pages)),
        Input("temperature", torch.float32, per_sequence),
        Input("top_k", torch.int64, per_sequence),
        Input("top_p", torch.float32, per_sequence),
        Input("seed", torch.int64, per_sequence),
        *versions,
    )


def _from_two(sequences: int) -> int | Range:
    return 2 if sequences == 2 else Range(2, sequences)


def num_tokens(sequences: int | Range) -> Input:
    """How many rows of each sequence are valid."""
    return Input("num_tokens", torch.int64, (sequences,))


class Qwen3_5MoeModel:
    """See `et_moe.pipeline.models.Model`, which this implements."""

    parts: ClassVar[dict[str, str]] = {
        "embedding": "embedding",
        "attention": "linear",
        "linear_attention": "linear",
        "experts": "experts",
        "shared_expert": "linear",
        "head": "linear",
    }
    joined: ClassVar[dict[str, str]] = {"shared_expert": "experts"}
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    prefixes = ("model.language_model.", "model.")
    skipped_prefixes = ("model.visual.", "visual.")
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
        self,
        config: ModelConfig,
        names: Collection[str],
        read: Callable[[str], Tensor],
        storages: Storages,
    ) -> Iterator[dict[str, Parts]]:
        return self.tensors.groups(config, names, read, is_joined(storages))

    def computed(self, config: ModelConfig, name: str) -> Tensor | None:
        return inverse_frequencies(config) if name.endswith(".inv_freq") else None

    def build(self, config: ModelConfig, precision: Precision) -> Graph:
        return build(config, precision, DecoderLayer)

    def methods(self, config: ModelConfig, sizes: Sizes) -> dict[str, Method]:
        outputs, next_call = ("token", "logits"), HandOver("token", "tokens", "positions")
        rows = Range(2, sizes.max_prefill_tokens)
        methods = {
            "prefill": Method((*make_inputs(1, rows, sizes), num_tokens(1)), outputs),
            # One sequence has a method of its own, whose kernels are made for a single row.
            "decode": Method(make_inputs(1, 1, sizes), outputs, next_call),
        }
        if sizes.score_tokens:
            # Always as many rows, of which `num_tokens` are valid: one range is to be compiled.
            inputs = (*make_inputs(1, sizes.score_tokens, sizes), num_tokens(1))
            methods["score"] = Method(inputs, outputs, full_logits=True)
        if sizes.max_sequences > 1:
            many = _from_two(sizes.max_sequences)
            inputs = (*make_inputs(many, 1, sizes), num_tokens(many))
            methods["decode_batch"] = Method(inputs, outputs, next_call)
        if sizes.draft_tokens:
            methods["draft_decode"] = self._draft_method(1, sizes)
            if sizes.draft_sequences > 1:
                many = _from_two(sizes.draft_sequences)
                methods["draft_decode_batch"] = self._draft_method(many, sizes)
        return methods

    def _draft_method(self, sequences: int | Range, sizes: Sizes) -> Method:
        """A decode method whose rows of a sequence are a token and its drafts."""
        inputs = make_inputs(sequences, 1 + sizes.draft_tokens, sizes)
        next_call = HandOver("step", "tokens", "positions", "versions")
        inputs += (num_tokens(sequences),)
        return Method(inputs, ("step",), next_call, sizes.draft_tokens)

    def random(self, name: str, shape: tuple[int, ...], std: float) -> Random:
        return random_values(name, shape, std)

    def preset_files(self, preset: str, text: dict[str, Any]) -> PresetFiles:
        return preset_files(preset, text)


MODEL = Qwen3_5MoeModel()
