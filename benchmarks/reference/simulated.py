"""A Hugging Face model that computes as if its weights and activations were quantized.

Weights are what a storage keeps of them, as floats; in front of them activations are rounded to
INT8 in the tiles that the ops take. Everything else stays float32, so a difference to the model as
it is comes from quantizing alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5MoeForCausalLM

from et_moe.backends.ops import dequantize_w4, dequantize_w8, quantize_int8
from et_moe.backends.ops.quantization import ACTIVATION_TILE, expert_activation_tile
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.importance import Moments
from et_moe.pipeline.storage import Dense, Int4, Storage


def as_stored(storage: Storage, weight: Tensor, method: str, importance: Tensor | None) -> Tensor:
    """What a storage keeps of a weight `[..., N, K]`, as float32."""
    if isinstance(storage, Dense):
        return weight.float()
    if isinstance(storage, Int4):
        if importance is not None and importance.dim() == 2:
            importance = importance[:, None]
        size = storage.group_size
        return dequantize_w4(*storage.quantize(weight, method, importance), size)
    return dequantize_w8(*storage.quantize(weight, method, importance))


def round_activations(x: Tensor, tile: int | None) -> Tensor:
    """`x` `[..., K]` as INT8 in tiles, or as it is without a tile."""
    if tile is None:
        return x
    q, scale = quantize_int8(x.flatten(0, -2), tile)
    scales = scale.repeat_interleave(tile, dim=1)[:, : q.shape[1]]
    return (q.float() * scales).view_as(x)


class SimulatedLinear(nn.Module):
    """A projection whose input is rounded in tiles, if any, and whose inputs may be watched."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.tile = linear.weight, None
        self.moments: Moments | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.moments is not None:
            self.moments.add(x.flatten(0, -2))
        return F.linear(round_activations(x, self.tile), self.weight)

    def watch(self) -> dict[str, Moments]:
        """Begins to sum; the weight's name -> its moments."""
        self.moments = Moments.zeros(self.weight.shape[1], device=self.weight.device)
        return {"weight": self.moments}


class SimulatedExperts(nn.Module):
    """Expert MLPs in the same way, expert by expert."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.tile: int | None = None
        self.inner_tile: int | None = None
        self.moments: tuple[Moments, Moments] | None = None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=len(self.down_proj)).tolist()
        rows, scales = order // ids.shape[1], weights.flatten()[order, None]
        rounded, out = round_activations(x, self.tile), torch.zeros_like(x)
        pieces = zip(rows.split(counts), scales.split(counts), strict=True)
        for expert, (chosen, scale) in enumerate(pieces):
            gate, up = F.linear(rounded[chosen], self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = F.silu(gate) * up
            self._record(expert, x[chosen], inner)
            inner = round_activations(inner, self.inner_tile)
            out.index_add_(0, chosen, F.linear(inner, self.down_proj[expert]) * scale)
        return out

    def _record(self, expert: int, *inputs: Tensor) -> None:
        for moments, rows in zip(self.moments or (), inputs, strict=self.moments is not None):
            moments.add(rows, expert)

    def watch(self) -> dict[str, Moments]:
        """As `SimulatedLinear.watch`."""
        names, made = ("gate_up_proj", "down_proj"), []
        for weight in (self.gate_up_proj, self.down_proj):
            experts, _, columns = weight.shape
            made.append(Moments.zeros(experts, columns, device=weight.device))
        self.moments = tuple(made)
        return dict(zip(names, made, strict=True))


@dataclass
class Simulation:
    """A model whose quantization can be changed.

    Args:
        model: in float32; its projections and experts are replaced.

    Attributes:
        weights: its quantizable weights as they were given, by their names in a checkpoint behind
            the prefix.
    """

    model: Qwen3_5MoeForCausalLM
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.model.model.layers:
            layer.mlp.experts = SimulatedExperts(layer.mlp.experts)
        for name, module in list(self.model.named_modules()):
            part = MODEL.part(f"{_short(name)}.weight")
            if isinstance(module, nn.Linear) and part is not None:
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, SimulatedLinear(module))
        for name, parameter in self.model.named_parameters():
            if MODEL.part(_short(name)) is not None:
                self.weights[_short(name)] = parameter.detach().bfloat16()

    def _parameters(self) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if _short(name) in self.weights:
                module = self.model.get_submodule(name.rpartition(".")[0])
                yield _short(name), module, parameter

    @torch.no_grad()
    def quantize(
        self,
        storage_of: Callable[[str], Storage],
        int8_activations: bool,
        method: str = "mse",
        importance: dict[str, Tensor] | None = None,
    ) -> None:
        """Quantizes all weights anew.

        Args:
            storage_of: the storage of a weight by its name.
            int8_activations: whether inputs of weights that are not dense are INT8.
            method, importance: of the INT4 scales; mean squares of the inputs by weight.
        """
        for name, module, parameter in self._parameters():
            storage, given = storage_of(name), (importance or {}).get(name)
            parameter.copy_(as_stored(storage, self.weights[name], method, given))
            quantized = int8_activations and not isinstance(storage, Dense)
            if isinstance(module, SimulatedExperts):
                inner = expert_activation_tile(module.down_proj.shape[2])
                module.tile = ACTIVATION_TILE if quantized else None
                module.inner_tile = inner if quantized else None
            elif isinstance(module, SimulatedLinear):
                module.tile = ACTIVATION_TILE if quantized else None
        if int8_activations:
            self._join(storage_of)

    def _join(self, storage_of: Callable[[str], Storage]) -> None:
        """A shared expert that is stored as the others are lies in their tables, whose inner
        activations have tiles of their own."""
        for index, layer in enumerate(self.model.model.layers):
            name = f"layers.{index}.mlp"
            shared = storage_of(f"{name}.shared_expert.down_proj.weight")
            if shared == storage_of(f"{name}.experts.down_proj"):
                layer.mlp.shared_expert.down_proj.tile = layer.mlp.experts.inner_tile

    @torch.no_grad()
    def moments(self, windows: Tensor) -> dict[str, Moments]:
        """The moments of all matrices' inputs over windows of tokens, int64 `[N, T]`."""
        found: dict[str, Moments] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, SimulatedLinear | SimulatedExperts):
                made = module.watch()
                found |= {f"{_short(name)}.{leaf}": moments for leaf, moments in made.items()}
        for piece in windows.split(16):
            self.model(input_ids=piece, use_cache=False)
        for module in self.model.modules():
            if isinstance(module, SimulatedLinear | SimulatedExperts):
                module.moments = None
        return found


def _short(name: str) -> str:
    return name.removeprefix("model.")
