"""What INT8 activations cost in accuracy: one bundle, run with INT8 and with bf16 activations.

One prefill of random token ids goes through the model twice, layer by layer, with one layer of the
bundle in memory. For each layer two relative L2 errors are measured: that of the mixture of
experts' output (without the residual) where both are given the input of the run with bf16
activations, and that of the hidden states of the two runs. At the end it is counted at how many
positions both have the same likeliest token. On a GPU the Triton kernels compute, elsewhere the
ops' eager references.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from et_moe.backends.ops import PAGE_SIZE
from et_moe.benchmarks.report.activations import cells
from et_moe.benchmarks.result import provenance, write_result
from et_moe.examples.qwen3_5_moe import graph as qwen
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.layers import Experts, Linear, StoredModule
from et_moe.pipeline.models import MTP
from et_moe.pipeline.quantize import meta_graph
from et_moe.pipeline.storage import Int4, Precision

ACTIVATIONS = ("bf16", "int8")
POSITIONS_AT_ONCE = 256
"""Rows of logits in memory."""


@contextlib.contextmanager
def triton_kernels(dispatch_key: str) -> Iterator[None]:
    """Lets `torch.ops.et_moe` run the Triton kernels on tensors of a dispatch key.

    Linear layers and experts then take prepacked weights (see `prepack`).
    """
    from et_moe.backends.cuda.triton.attention.op import attention
    from et_moe.backends.cuda.triton.embedding.op import embedding_w4, embedding_w8
    from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net
    from et_moe.backends.cuda.triton.linear import op as linear
    from et_moe.backends.cuda.triton.moe import op as moe
    from et_moe.backends.cuda.triton.router.op import moe_router

    functions = [attention, embedding_w4, embedding_w8, gated_delta_net, moe_router]
    functions += [linear.linear_w4a8, linear.linear_w4a16, moe.moe_w4a8, moe.moe_w4a16]
    with torch.library._scoped_library("et_moe", "IMPL") as library:
        for function in functions:
            library.impl(function.__name__, function, dispatch_key)
        yield


def prepack(module: torch.nn.Module) -> None:
    """Brings the INT4 weights of a module into the order that the Triton kernels read."""
    from et_moe.backends.cuda.triton.linear.layout import prepack_linear
    from et_moe.backends.cuda.triton.moe.layout import prepack_experts

    for part in module.modules():
        if isinstance(part, Linear):
            names, pack = ("weight", "scale"), prepack_linear
        elif isinstance(part, Experts):
            names, pack = ("w13", "w13_scale", "w2", "w2_scale"), prepack_experts
        else:
            continue
        packed = pack(*(getattr(part, name).data for name in names), part.storage.group_size)
        for name, tensor in zip(names, packed, strict=True):
            setattr(part, name, torch.nn.Parameter(tensor, requires_grad=False))


def set_activations(module: torch.nn.Module, dtype: str) -> None:
    """Chooses the dtype of activations in front of the module's INT4 weights."""
    for part in module.modules():
        if isinstance(part, StoredModule):
            part.precision = dataclasses.replace(part.precision, activation_dtype=dtype)


@dataclasses.dataclass
class Comparison:
    """The two runs, which take one group of the bundle's tensors after the other.

    Args:
        bundle: its linear layers and experts have INT4 weights.
        dtype: the dtype of activations and caches.
        packed: whether the ops take prepacked weights.
    """

    bundle: Bundle
    dtype: torch.dtype
    device: torch.device
    packed: bool

    def __post_init__(self) -> None:
        for part, storage in self.bundle.storages.items():
            if part != "embedding" and not isinstance(storage, Int4):
                where = f"{self.bundle.directory}: {part} is stored as {storage.kind}"
                raise ConfigError(f"{where}, not quantized to int4: nothing to compare")
        precision = Precision(self.bundle.storages, dtype=self.dtype)
        self.model = meta_graph(self.bundle.config, precision)

    def run(self, ids: Tensor) -> Iterator[dict]:
        """Yields a row per layer and, last, one of the logits.

        Args:
            ids: the prompt's tokens, `int64 [T]`.
        """
        hidden: dict[str, Tensor] = {}
        for group in self.bundle.groups():
            name = next(iter(group))
            if name.startswith("embed_tokens."):
                x = self._load(self.model.embed_tokens, "embed_tokens.", group)(ids)
                hidden = dict.fromkeys(ACTIVATIONS, x)
            elif name.startswith("layers."):
                yield self._layer(int(name.split(".")[1]), group, hidden)
            elif not name.startswith(MTP):  # that head takes no part in the model's tokens
                yield self._head(group, hidden)

    def _load(self, module: torch.nn.Module, prefix: str, group: Mapping[str, Tensor]):
        tensors = {
            name.removeprefix(prefix): tensor.to(self.device)
            for name, tensor in group.items()
            if name.startswith(prefix)
        }
        expected = dict(module.named_parameters())
        tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
        module.load_state_dict(tensors, assign=True)
        if self.packed:
            prepack(module)
        return module

    def _state(self, prefix: str, pages: int) -> qwen.State:
        return {
            name: torch.zeros((pages, *given.shape), dtype=given.dtype, device=self.device)
            for name, given in self.model.state_spec().items()
            if name.startswith(prefix)
        }

    def _places(self, pages: int) -> qwen.Places:
        """Of one sequence that begins, in the first slot and in all pages."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        table = torch.arange(pages, dtype=torch.int32, device=self.device)[None]
        return qwen.Places(positions=zero, slots=zero.int(), pages=table, num_tokens=None)

    def _layer(self, index: int, group: Mapping[str, Tensor], hidden: dict[str, Tensor]) -> dict:
        """Advances both runs by a layer."""
        prefix, kind = f"layers.{index}.", self.bundle.config.layer_types[index]
        layer = self._load(self.model.layers[index], prefix, group)
        mixer = layer.linear_attn if kind == "linear_attention" else layer.self_attn
        norm = layer.post_attention_layernorm.weight
        pages, row = -(-len(hidden["bf16"]) // PAGE_SIZE), {}
        for activations in ACTIVATIONS:
            set_activations(layer, activations)
            norm_in, state = layer.input_layernorm.weight, self._state(prefix, pages)
            x = mixer(hidden[activations], norm_in, self._places(pages), state)
            if activations == "bf16":
                row["moe_error"] = self._moe_error(layer.mlp, x, norm)
                set_activations(layer, activations)
            hidden[activations] = layer.mlp(x, norm, None)
        layer.to("meta")
        distance = relative_error(hidden["int8"], hidden["bf16"])
        return {"layer": index, "kind": kind} | row | {"hidden_error": distance}

    def _moe_error(self, moe: qwen.SparseMoe, x: Tensor, norm: Tensor) -> float:
        normed, weights, ids = torch.ops.et_moe.moe_router(
            x, norm, moe.gate.weight, moe.top_k, moe.shared, moe.eps, None
        )
        outputs = {}
        for activations in ACTIVATIONS:
            set_activations(moe, activations)
            outputs[activations] = moe.experts(normed, weights, ids, residual=None)
        return relative_error(outputs["int8"], outputs["bf16"])

    def _head(self, group: Mapping[str, Tensor], hidden: dict[str, Tensor]) -> dict:
        """Compares the logits of all positions."""
        norm = self._load(self.model.norm, "norm.", group).weight
        head = self._load(self.model.lm_head, "lm_head.", group)
        agree, difference, size = 0, 0.0, 0.0
        for rows in range(0, len(hidden["bf16"]), POSITIONS_AT_ONCE):
            logits = {}
            for activations in ACTIVATIONS:
                set_activations(head, activations)
                x = hidden[activations][rows : rows + POSITIONS_AT_ONCE].float()
                logits[activations] = head(x, norm=norm)
            agree += int((logits["int8"].argmax(-1) == logits["bf16"].argmax(-1)).sum())
            difference += (logits["int8"] - logits["bf16"]).double().square().sum().item()
            size += logits["bf16"].double().square().sum().item()
        error = (difference / size) ** 0.5
        return {"top1_agreement": agree / len(hidden["bf16"]), "logits_error": error}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of `expected`.

    Raises:
        ValueError: a value is not finite, or `expected` is zero.
    """
    expected = expected.double()
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error < float("inf"):
        raise ValueError("hidden states are not finite, or zero: the weights cannot be compared")
    return error


def measure(bundle: Path, tokens: int, seed: int, out: Path) -> None:
    """Compares on the first GPU, or on the CPU where there is none.

    Args:
        bundle: folder of INT4 weights.
        tokens: positions to compare; seed: of their random token ids.
    """
    source, gpu = Bundle(bundle), torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, source.config.vocab_size, (tokens,), generator=generator).to(device)
    comparison = Comparison(source, torch.bfloat16, device, packed=gpu)
    rows = []
    with torch.no_grad(), triton_kernels("CUDA") if gpu else contextlib.nullcontext():
        for row in comparison.run(ids):
            print(row, flush=True)
            rows.append(row)
    head = {"kernels": "Triton kernels" if gpu else "eager references"}
    head |= {"tokens": tokens, "seed": seed, **rows.pop()}
    write_result(out, provenance() | head | {"layers": rows})
    table = Table("layer", "kind", "MoE output, same input", "hidden state of the two runs")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=110).print(table)
    print(f"top-1 agreement {head['top1_agreement']:.2%} over {tokens} positions")
