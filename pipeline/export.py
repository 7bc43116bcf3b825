"""Exports the model: graphs to `model.pte`, weights to `model.ptd`, the tokenizer beside them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from et_moe.backends.atomic_file import write_file
from et_moe.backends.method_graph import PAGES, SLOTS, MethodGraph
from et_moe.backends.ops import PAGE_SIZE
from et_moe.backends.sealed_file import FINGERPRINT, LAYOUT, PtdWriter, write_sealed
from et_moe.backends.threads import write_behind
from et_moe.pipeline.bundle import BUNDLE_VERSION, COPIED_FILES, copy_files
from et_moe.pipeline.config import Config, ConfigError
from et_moe.pipeline.draft_head import check_draft_vocabulary, with_draft_head
from et_moe.pipeline.footprint import Footprint, footprint
from et_moe.pipeline.graphs import build_graphs
from et_moe.pipeline.locks import sole_writer
from et_moe.pipeline.models import Sizes
from et_moe.pipeline.quantize import (
    WeightSource,
    meta_graph,
    parameter_groups,
)
from et_moe.pipeline.storage import (
    Precision,
    Storages,
    storages_to_json,
)
from et_moe.pipeline.tokenizer import check_tokenizer

FORMAT_VERSION = 5
MAX_PREFILL_TOKENS = 2048
"""Longest prompt piece of one prefill call; a runner feeds longer prompts piece by piece."""
MAX_SEQUENCES = 256
"""Most sequences of one decode call that are supported."""
MAX_DRAFT_TOKENS = 3
"""Most drafts of a sequence in a decode call that are supported."""
MAX_DRAFT_SEQUENCES = 4
"""Most sequences of a decode call that is fed drafts."""
MAX_CUDA_DRAFT_ROWS = 4
"""Most rows of such a call on CUDA, where up to four have the bits that each has alone
(`docs/performance.md`): with more, drafts would change tokens."""
SCORE_TOKENS = 64
"""Of a call of `score`, whose logits with a vocabulary of 248,320 take 64 MB."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_sizes(config: Config, options: "ExportOptions") -> Sizes:
    """The sizes of a program; a ConfigError names the flag that asks for what cannot be had."""
    max_seq_len = resolve_max_seq_len(config, options.max_seq_len)
    if not 1 <= options.max_sequences <= MAX_SEQUENCES:
        raise ConfigError(f"--max-sequences {options.max_sequences}: expected 1 to {MAX_SEQUENCES}")
    if not 0 <= options.draft_tokens <= MAX_DRAFT_TOKENS:
        raise ConfigError(
            f"--draft-tokens {options.draft_tokens}: expected 0 to {MAX_DRAFT_TOKENS}"
        )
    if options.draft_tokens and not config.mtp_num_hidden_layers:
        raise ConfigError(
            f"--draft-tokens {options.draft_tokens}: the model has no head for multi-token "
            "prediction (mtp_num_hidden_layers in its config.json, tensors mtp.*), expected 0"
        )
    check_draft_vocabulary(options.draft_vocabulary, config.vocab_size, options.draft_tokens)
    prefill_tokens = min(max_seq_len, MAX_PREFILL_TOKENS)
    score_tokens = min(prefill_tokens, SCORE_TOKENS) if options.score else 0
    sequences = min(options.max_sequences, MAX_DRAFT_SEQUENCES)
    if options.backend == "cuda":
        sequences = min(sequences, MAX_CUDA_DRAFT_ROWS // (1 + options.draft_tokens))
    drafts = options.draft_tokens, sequences, options.draft_vocabulary
    return Sizes(max_seq_len, prefill_tokens, options.max_sequences, *drafts, score_tokens)


def constant_methods(config: Config, precision: Precision, sizes: Sizes) -> dict[str, object]:
    """Methods without inputs that tell a runner about the model (ExecuTorch's names)."""
    quantization = storages_to_json(precision.storages)
    taken = footprint(meta_graph(config, precision))
    drafts = {
        "get_draft_tokens": sizes.draft_tokens,
        "get_draft_sequences": sizes.draft_sequences,
    }
    more = (drafts if sizes.draft_tokens else {}) | {"get_score_tokens": sizes.score_tokens}
    return {name: value for name, value in more.items() if value} | {
        "get_max_seq_len": sizes.max_seq_len,
        "get_max_prefill_tokens": sizes.max_prefill_tokens,
        "get_max_sequences": sizes.max_sequences,
        "get_page_size": PAGE_SIZE,
        "get_max_pages": sizes.max_pages,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers,
        "get_eos_ids": json.dumps(list(config.eos_token_ids)),
        "get_bundle_version": BUNDLE_VERSION,
        "get_format_version": FORMAT_VERSION,
        "get_quantization": json.dumps(quantization),
        "get_activation_dtype": json.dumps(precision.activation_dtype),
        "get_bits_per_weight": taken.bits_per_weight,
        "get_bytes_per_token": taken.bytes_per_token,
    }


def resolve_max_seq_len(c: Config, requested: int | None) -> int:
    """The context length: at least 3, at most what the model was made for; 4096 by default.

    `prefill` takes 2 tokens or more, and `torch.export` wants a dimension that varies.
    """
    smallest, limit = 3, c.max_position_embeddings
    if limit < smallest:
        raise ConfigError(f"max_position_embeddings {limit}: expected at least {smallest}")
    if requested is None:
        return min(4096, limit)
    if not smallest <= requested <= limit:
        raise ConfigError(
            f"--max-seq-len {requested}: expected {smallest} to {limit} (the model's limit)"
        )
    return requested


@dataclass(frozen=True)
class ExportOptions:
    """What to export for.

    Attributes:
        backend: "cpu" or "cuda".
        dtype: float32 or bfloat16, of activations, caches and weights that are not quantized.
        activation_dtype: "int8" or "bf16", of the inputs of INT4 layers, see `Precision`.
        max_seq_len: most tokens of a sequence, prompt and generated ones together; None for the
            model's own limit, at most 4096.
        max_sequences: most sequences of one decode call, at most 256.
        draft_tokens: that the MTP head guesses behind each token that is drawn, 0 to 3.
        draft_vocabulary: among how many tokens, the first ones; 0 for all.
        score: whether there is a method that returns the logits behind every token it is fed.
        recurrent_state_dtype: float32 or bfloat16, of the recurrent state of linear attention.
        cuda_archs: architectures to compile for, such as "sm_90".
        cache_dir: where compiled CUDA code is kept for the next export; None for nowhere.
        debug_sidecar: also write `kernels.json`, the source of every CUDA kernel.
    """

    backend: str = "cpu"
    dtype: torch.dtype = torch.float32
    activation_dtype: str = "int8"
    max_seq_len: int | None = None
    max_sequences: int = 64
    cuda_archs: tuple[str, ...] = ()
    cache_dir: Path | None = None
    debug_sidecar: bool = False
    draft_tokens: int = 0
    draft_vocabulary: int = 0
    score: bool = False
    recurrent_state_dtype: torch.dtype = torch.float32


class Target(Protocol):
    """What is lowered: a model of a configuration, with the storage of its parts."""

    config: Config
    storages: Storages


_FREE_KEYS = ("eos_token_ids", "max_position_embeddings", "mtp_num_hidden_layers")
"""Of a configuration: those that change neither what weights mean nor what is computed. Whether a
program has the MTP head follows from its number of drafts."""


def fingerprint(target: Target, options: ExportOptions) -> str:
    """What a program and its weights must agree in, as one JSON object: the model, its
    configuration, how its parts are stored, and for what they were prepared.

    Both files have it, `model.pte` as the constant method `get_fingerprint` and `model.ptd` as the
    tensor `FINGERPRINT`, and a runner compares them. The values of the weights are no part of it,
    so that a program may be exported from a configuration alone, and neither are the context length
    and the dtypes of activations and recurrent state, in which programs for the same weights may
    differ.
    """
    config = asdict(target.config)
    return json.dumps(
        {
            "model_type": target.config.model_type,
            **{key: value for key, value in config.items() if key not in _FREE_KEYS},
            "storages": storages_to_json(target.storages),
            "dtype": str(options.dtype).removeprefix("torch."),
            "backend": options.backend,
            **{n: v for n in ("draft_tokens", "draft_vocabulary") if (v := getattr(options, n))},
        },
        sort_keys=True,
    )


def _precision(target: Target, options: ExportOptions) -> Precision:
    return Precision(
        target.storages, options.activation_dtype, options.dtype, options.recurrent_state_dtype
    )


def _without_head(config: Config) -> Config:
    return replace(config, mtp_num_hidden_layers=0)


def program_footprint(target: Target, options: ExportOptions) -> Footprint:
    """What the weights of a program take, without the MTP head's."""
    return footprint(meta_graph(_without_head(target.config), _precision(target, options)))


def _graphs(target: Target, options: ExportOptions) -> tuple[dict[str, MethodGraph], dict]:
    """The methods' graphs and the constant methods."""
    precision, without_head = _precision(target, options), _without_head(target.config)
    sizes = resolve_sizes(target.config, options)
    config = target.config if sizes.draft_tokens else without_head
    graphs = build_graphs(config, precision, sizes)
    constants = constant_methods(without_head, precision, sizes)
    return graphs, constants | {"get_fingerprint": fingerprint(target, options)}


def plan_weights(target: Target, options: ExportOptions):
    """What goes into the `.ptd` (`spec`) and how it is made (`pack`); needs no ExecuTorch."""
    if options.backend == "cuda":
        from et_moe.backends.cuda import prepack as backend
    else:
        from et_moe.backends.cpu import lowering as backend
    return backend.plan_weights(_graphs(target, options)[0])


def lower(target: Target, options: ExportOptions):
    """Lowers a model; needs no weights.

    Returns:
        The backend's `LoweredProgram`: `pte` bytes, and `plan` as of `plan_weights`.
    """
    graphs, constants = _graphs(target, options)
    if options.backend == "cuda":
        from et_moe.backends.cuda import backend as cuda

        own_pool = {PAGES: constants["get_max_pages"], SLOTS: 1}
        archs = list(options.cuda_archs)
        return cuda.lower(graphs, archs, constants, options.cache_dir, own_pool)
    from et_moe.backends.cpu import lowering as cpu

    return cpu.lower(graphs, constants)


@contextlib.contextmanager
def output_folder(
    target: Target, output: Path, options: ExportOptions, graph: bool = True, weights: bool = True
) -> Iterator[None]:
    """Refuses early what could not be exported, and holds `output` for this process alone.

    Args:
        graph, weights: whether `model.pte`, and `model.ptd` with the tokenizer, will be written.

    Raises:
        ConfigError, OSError: as `export`.
    """
    resolve_sizes(target.config, options)
    names = []
    if weights:
        check_tokenizer(target.directory)
        names.append("model.ptd")
    if graph:
        names += ["model.pte", *(["kernels.json"] if options.debug_sidecar else [])]
    with sole_writer(output, names):
        yield


def export(
    source: WeightSource,
    output: Path,
    options: ExportOptions,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Writes `model.pte`, `model.ptd` and the bundle's `COPIED_FILES`.

    Args:
        source: a bundle, or a checkpoint quantized on the way; read one group at a time.
        output: directory, created if need be; existing files of these names are replaced.
        progress: called with the name of each stage as it ends.

    Raises:
        ConfigError: an unsupported configuration, a damaged source, a tokenizer that the runner
            would refuse, or another process that writes to `output`.
        OSError: the output cannot be written; nothing is left under a final name.
    """
    with output_folder(source, output, options):
        write_program(source, output, options, progress)


def write_program(
    source: WeightSource,
    output: Path,
    options: ExportOptions,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """`export`, inside of an `output_folder`."""
    lowered = lower(source, options)
    progress("graphs")
    write_weights(source, lowered.plan, output, options, progress)
    write_graphs(lowered, output, options)
    progress("files")


def write_weights(
    source: WeightSource,
    plan,
    output: Path,
    options: ExportOptions,
    progress: Callable[[str], None] = lambda stage: None,
) -> None:
    """Writes `model.ptd`, two groups of tensors in memory, and the `COPIED_FILES`."""
    output.mkdir(parents=True, exist_ok=True)
    texts = {LAYOUT: plan.layout, FINGERPRINT: fingerprint(source, options)}
    with PtdWriter(output / "model.ptd", plan.spec, texts) as writer:

        def packed() -> Iterator[list[tuple[str, Tensor]]]:
            # The MTP head, which comes last, is in no program without drafts.
            wanted = parameter_groups(plan.spec)
            groups = with_draft_head(source.groups(), options.draft_vocabulary)
            for names, group in zip(wanted, groups, strict=False):
                yield list(plan.pack({name: group.pop(name) for name in names}))

        def write(tensors: list[tuple[str, Tensor]]) -> None:
            for name, tensor in tensors:
                writer.write(name, tensor)
            progress("weights")

        write_behind(packed(), write)
    copy_files(source.directory, output, COPIED_FILES)


def write_graphs(lowered, output: Path, options: ExportOptions) -> None:
    """Writes `model.pte`, and `kernels.json` if it was asked for."""
    output.mkdir(parents=True, exist_ok=True)
    write_sealed(output / "model.pte", lowered.pte)
    if options.debug_sidecar:
        write_file(output / "kernels.json", lowered.sidecar().encode())
