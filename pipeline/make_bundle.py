"""Random bundles: the quantized files of a preset at disk speed, without a checkpoint.

For measuring speed and memory at full size: routing is near uniform and activations stay finite,
as with a random checkpoint.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from et_moe.backends.threads import worker_threads
from et_moe.pipeline.bundle import write_bundle, write_json
from et_moe.pipeline.config import Config
from et_moe.pipeline.layers import StoredWeight, stored_weights
from et_moe.pipeline.make_checkpoint import text_config
from et_moe.pipeline.models import Graph, Model, model_of, parse_config
from et_moe.pipeline.quantize import meta_graph, parameter_groups, parameter_spec
from et_moe.pipeline.storage import Precision, Storages, choose_storages

WEIGHT_RMS = 0.02
"""Root mean square of a dequantized weight: Hugging Face's initializer_range."""

# Root mean square of what uniform bytes hold: integers -8..7, two a byte, and -128..127.
_RMS = {
    torch.uint8: ((16**2 - 1) / 12 + 0.25) ** 0.5,
    torch.int8: ((256**2 - 1) / 12 + 0.25) ** 0.5,
}


@dataclass
class RandomWeights:
    """A `WeightSource` of random tensors; each depends on the seed and its name alone."""

    directory: Path
    config: Config
    storages: Storages
    seed: int

    def groups(self) -> Iterator[dict[str, Tensor]]:
        graph = meta_graph(self.config, Precision(self.storages))
        spec, rms = parameter_spec(graph), scale_rms(graph, stored_weights(graph))
        with worker_threads() as pool:
            for names in parameter_groups(spec):
                tensors = pool.map(
                    lambda name: self._tensor(name, *spec[name], rms.get(name)), names
                )
                yield dict(zip(names, tensors, strict=True))

    def _tensor(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], rms: float | None
    ) -> Tensor:
        """`rms`: of the integers that a tensor of scales belongs to; None for other tensors."""
        model = model_of(self.config)
        if (computed := model.computed(self.config, name)) is not None:
            return computed
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = numpy.random.Generator(numpy.random.SFC64(list(digest)))
        if not dtype.is_floating_point:
            size = torch.Size(shape).numel()
            words = generator.integers(0, 1 << 64, -(-size // 8), dtype=numpy.uint64)
            return torch.from_numpy(words.view(numpy.uint8)[:size]).view(dtype).reshape(shape)
        uniform = torch.from_numpy(generator.random(shape, dtype=numpy.float32))
        if rms is not None:
            return ((0.5 + uniform) * (WEIGHT_RMS / rms)).to(dtype)
        values = model.random(name, shape, WEIGHT_RMS)
        if values.log_uniform is not None:
            low, high = values.log_uniform
            return (low + (high - low) * uniform).log().to(dtype)
        # Vectors at their mean and all matrices alike: with a convolution of its own scale hidden
        # states would grow alike, until all tokens choose the same experts.
        std = WEIGHT_RMS if len(shape) > 1 else 0.0
        return (values.mean + (uniform - 0.5) * (12**0.5 * std)).to(dtype)


def scale_rms(graph: Graph, stored: Mapping[str, StoredWeight]) -> dict[str, float]:
    """Name of every tensor of scales -> root mean square of the random integers it belongs to."""
    parameters = dict(graph.named_parameters())
    return {
        scale: _RMS[parameters[weight.tensors[0]].dtype]
        for weight in stored.values()
        for scale in weight.tensors[1:]
    }


def make_bundle(
    output: Path,
    model: Model,
    preset: str,
    seed: int,
    layers: int | None = None,
    recipe: str = "4w",
    overrides: dict[str, Any] | None = None,
) -> None:
    """Writes a random bundle in the format of `write_bundle`, two layers in memory.

    Args:
        output: directory to create; must not hold a config.json.
        preset: a key of `model.presets`.
        seed: of all tensors.
        layers: fewer layers than the preset has.
        recipe: how the parts are stored, one of `storage.RECIPES`.
        overrides: replacements for values of the preset's text config.
    """
    text = text_config(model, preset, layers, overrides)
    smallest = min(text["hidden_size"], text["moe_intermediate_size"])
    storages = choose_storages(model.parts, group_size=min(128, smallest), recipe=recipe)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", text)
        config = parse_config(text, where=f"preset {preset}")
        write_bundle(RandomWeights(Path(folder), config, storages, seed), output)
