"""Exports the model: graphs to `model.pte`, weights to `model.ptd`, the tokenizer beside them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from et_moe.backends.atomic_file import write_file
from et_moe.backends.method_graph import MethodGraph
from et_moe.backends.sealed_file import PtdWriter, write_sealed
from et_moe.backends.threads import write_behind
from et_moe.examples.qwen3_5_moe.graph import Quantization, Qwen3_5Moe
from et_moe.pipeline.bundle import (
    BUNDLE_VERSION,
    TOKENIZER_FILES,
    WeightSource,
    copy_files,
    parameter_groups,
)
from et_moe.pipeline.config import ConfigError, ModelConfig

FORMAT_VERSION = 1
MAX_PREFILL_TOKENS = 2048
"""Longest prompt piece of one prefill call; a runner feeds longer prompts piece by piece."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

INPUTS = {
    "prefill": ["tokens", "position", "num_tokens", "temperature", "top_k", "top_p", "seed"],
    "decode": ["tokens", "position", "temperature", "top_k", "top_p", "seed"],
}


class _Method(nn.Module):
    """The model with its weights passed in, so that the graph has them as inputs."""

    def __init__(self, model: Qwen3_5Moe, inputs: list[str]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: its own parameters must not become the graph's
        self._inputs = inputs

    def forward(self, inputs: list[Tensor], state: dict[str, Tensor], weights: dict[str, Tensor]):
        arguments = dict(zip(self._inputs, inputs, strict=True))
        arguments.setdefault("num_tokens", None)
        return torch.func.functional_call(
            self._model[0], weights, (), {**arguments, "state": state}
        )


def _example(name: str, tokens: int) -> Tensor:
    if name == "tokens":
        return torch.empty((1, tokens), dtype=torch.int64)
    floating = name in ("temperature", "top_p")
    return torch.empty(1, dtype=torch.float32 if floating else torch.int64)


def build_graphs(
    c: ModelConfig, q: Quantization, dtype: torch.dtype, max_seq_len: int
) -> dict[str, MethodGraph]:
    """Exports `prefill` (2 to `max_prefill_tokens` tokens) and `decode` (one token).

    Works on fake tensors: no weight is allocated, whatever the model's size.
    """
    with torch.device("meta"):
        model = Qwen3_5Moe(c, q, dtype)
    graphs = {}
    for method, names in INPUTS.items():
        tokens = 1 if method == "decode" else min(8, max_prefill_tokens(max_seq_len))
        with FakeTensorMode():
            inputs = [_example(name, tokens) for name in names]
            state = {
                name: torch.empty(shape, dtype=kind)
                for name, (kind, shape) in model.state_spec(max_seq_len).items()
            }
            weights = {
                name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()
            }
        length = Dim("tokens", min=2, max=max_prefill_tokens(max_seq_len))
        program = torch.export.export(
            _Method(model, names),
            (inputs, state, weights),
            dynamic_shapes=(
                [{1: length} if n == "tokens" and method == "prefill" else None for n in names],
                dict.fromkeys(state),
                dict.fromkeys(weights),
            ),
            strict=False,
        )
        graphs[method] = MethodGraph(program, names, list(state), list(weights))
    return graphs


def max_prefill_tokens(max_seq_len: int) -> int:
    """Upper bound of the token dimension of `prefill`."""
    return min(max_seq_len, MAX_PREFILL_TOKENS)


def constant_methods(c: ModelConfig, q: Quantization, max_seq_len: int) -> dict[str, object]:
    """Methods without inputs that tell a runner about the model (ExecuTorch's names)."""
    return {
        "get_max_seq_len": max_seq_len,
        "get_max_prefill_tokens": max_prefill_tokens(max_seq_len),
        "get_vocab_size": c.vocab_size,
        "get_n_layers": c.num_hidden_layers,
        "get_eos_ids": json.dumps(list(c.eos_token_ids)),
        "get_bundle_version": BUNDLE_VERSION,
        "get_format_version": FORMAT_VERSION,
        "get_quantization": json.dumps(vars(q)),
    }


def resolve_max_seq_len(c: ModelConfig, requested: int | None) -> int:
    """The context length: at least 2, at most what the model was made for; 4096 by default."""
    if requested is None:
        return min(4096, c.max_position_embeddings)
    if not 2 <= requested <= c.max_position_embeddings:
        limit = c.max_position_embeddings
        raise ConfigError(f"--max-seq-len {requested}: expected 2 to {limit} (the model's limit)")
    return requested


@dataclass(frozen=True)
class ExportOptions:
    """What to export for.

    Attributes:
        backend: "cpu" or "cuda".
        dtype: float32 or bfloat16, of activations, caches and weights that are not quantized.
        max_seq_len: capacity of the KV cache, prompt and generated tokens together; None for the
            model's own limit, at most 4096.
        cuda_archs: architectures to compile for, such as "sm_90".
        cache_dir: where compiled CUDA code is kept for the next export; None for nowhere.
        debug_sidecar: also write `kernels.json`, the source of every CUDA kernel.
    """

    backend: str = "cpu"
    dtype: torch.dtype = torch.float32
    max_seq_len: int | None = None
    cuda_archs: tuple[str, ...] = ()
    cache_dir: Path | None = None
    debug_sidecar: bool = False


def _graphs(c: ModelConfig, q: Quantization, options: ExportOptions) -> dict[str, MethodGraph]:
    if options.backend == "cuda" and q.qlinear != "4w":
        raise ConfigError(f"--qlinear {q.qlinear}: the CUDA backend has INT4 kernels only, use 4w")
    return build_graphs(c, q, options.dtype, resolve_max_seq_len(c, options.max_seq_len))


def plan_weights(c: ModelConfig, q: Quantization, options: ExportOptions):
    """What goes into the `.ptd` (`spec`) and how it is made (`pack`); needs no ExecuTorch."""
    if options.backend == "cuda":
        from et_moe.backends.cuda import prepack as backend
    else:
        from et_moe.backends.cpu import lowering as backend
    return backend.plan_weights(_graphs(c, q, options))


def lower(c: ModelConfig, q: Quantization, options: ExportOptions):
    """Lowers the model of a configuration; needs no weights.

    Returns:
        The backend's `LoweredProgram`: `pte` bytes, and `plan` as of `plan_weights`.
    """
    graphs = _graphs(c, q, options)
    constants = constant_methods(c, q, resolve_max_seq_len(c, options.max_seq_len))
    if options.backend == "cuda":
        from et_moe.backends.cuda import backend as cuda

        return cuda.lower(graphs, list(options.cuda_archs), constants, options.cache_dir)
    from et_moe.backends.cpu import lowering as cpu

    return cpu.lower(graphs, constants)


def export(
    source: WeightSource,
    output: Path,
    options: ExportOptions,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Writes `model.pte`, `model.ptd` and the tokenizer's files.

    Args:
        source: a bundle, or a checkpoint quantized on the way; read one group at a time.
        output: directory, created if need be; existing files of these names are replaced.
        progress: called with the name of each stage as it ends.

    Raises:
        ConfigError: an unsupported configuration or a damaged source.
        OSError: the output cannot be written; nothing is left under a final name.
    """
    output.mkdir(parents=True, exist_ok=True)
    lowered = lower(source.config, source.quantization, options)
    progress("graphs")
    write_weights(source, lowered.plan, output, progress)
    write_graphs(lowered, output, options)
    progress("files")


def write_weights(
    source: WeightSource,
    plan,
    output: Path,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Writes `model.ptd`, two groups of tensors in memory, and the tokenizer's files."""
    output.mkdir(parents=True, exist_ok=True)
    with PtdWriter(output / "model.ptd", plan.spec, plan.layout) as writer:

        def packed() -> Iterator[list[tuple[str, Tensor]]]:
            for names, group in zip(parameter_groups(plan.spec), source.groups(), strict=True):
                yield list(plan.pack({name: group.pop(name) for name in names}))

        def write(tensors: list[tuple[str, Tensor]]) -> None:
            for name, tensor in tensors:
                writer.write(name, tensor)
            progress("weights")

        write_behind(packed(), write)
    copy_files(source.directory, output, TOKENIZER_FILES)


def write_graphs(lowered, output: Path, options: ExportOptions) -> None:
    """Writes `model.pte`, and `kernels.json` if it was asked for."""
    output.mkdir(parents=True, exist_ok=True)
    write_sealed(output / "model.pte", lowered.pte)
    if options.debug_sidecar:
        write_file(output / "kernels.json", lowered.sidecar().encode())
