"""Random bundles: the quantized files of a preset at disk speed, without a checkpoint.

For measuring speed and memory at full size: routing is near uniform and activations stay finite,
as with a random checkpoint.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from et_moe.backends.threads import worker_threads
from et_moe.examples.qwen3_5_moe.graph import Quantization
from et_moe.pipeline.bundle import (
    parameter_groups,
    parameter_spec,
    write_bundle,
    write_json,
)
from et_moe.pipeline.checkpoint import inverse_frequencies
from et_moe.pipeline.config import ModelConfig, parse_config
from et_moe.pipeline.make_checkpoint import text_config

WEIGHT_RMS = 0.02
"""Root mean square of a dequantized weight: Hugging Face's initializer_range."""

_INT4_RMS = ((16**2 - 1) / 12 + 0.25) ** 0.5  # of uniform integers -8..7
_INT8_RMS = ((256**2 - 1) / 12 + 0.25) ** 0.5


@dataclass
class RandomWeights:
    """A `WeightSource` of random tensors; each depends on the seed and its name alone."""

    directory: Path
    config: ModelConfig
    quantization: Quantization
    seed: int

    def groups(self) -> Iterator[dict[str, Tensor]]:
        spec = parameter_spec(self.config, self.quantization, torch.bfloat16)
        with worker_threads() as pool:
            for names in parameter_groups(spec):
                tensors = pool.map(lambda name: self._tensor(name, *spec[name]), names)
                yield dict(zip(names, tensors, strict=True))

    def _tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = numpy.random.Generator(numpy.random.SFC64(list(digest)))
        if not dtype.is_floating_point:
            size = torch.Size(shape).numel()
            words = generator.integers(0, 1 << 64, -(-size // 8), dtype=numpy.uint64)
            return torch.from_numpy(words.view(numpy.uint8)[:size]).view(dtype).reshape(shape)
        if name.endswith(".inv_freq"):
            return inverse_frequencies(self.config)
        uniform = torch.from_numpy(generator.random(shape, dtype=numpy.float32))
        if name.endswith("scale"):
            rms = _INT8_RMS if name.startswith("embed_tokens.") else _INT4_RMS
            return ((0.5 + uniform) * (WEIGHT_RMS / rms)).to(dtype)
        if name.endswith(".A_log"):
            return (0.01 + 15.99 * uniform).log().to(dtype)
        if name.endswith((".dt_bias", "linear_attn.norm.weight")):
            return torch.ones(shape, dtype=dtype)
        if name.endswith("norm.weight"):
            return torch.zeros(shape, dtype=dtype)
        return ((uniform - 0.5) * (12**0.5 * WEIGHT_RMS)).to(dtype)


def make_bundle(output: Path, preset: str, seed: int, layers: int | None = None) -> None:
    """Writes a random bundle in the format of `write_bundle`, two layers in memory.

    Args:
        output: directory to create; must not hold a config.json.
        preset: a key of `make_checkpoint.PRESETS`.
        seed: of all tensors.
        layers: fewer layers than the preset has.
    """
    text = text_config(preset, layers)
    smallest = min(text["hidden_size"], text["moe_intermediate_size"])
    quantization = Quantization(group_size=min(128, smallest))
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", text)
        config = parse_config(text, where=f"preset {preset}")
        write_bundle(RandomWeights(Path(folder), config, quantization, seed), output)
