"""Exports small models for the CPU and for CUDA: `python make_programs.py FOLDER`.

It runs in a process of its own, as tests interpret kernels in theirs, and needs `tests` and
`tests/backends/cuda` in PYTHONPATH.

FOLDER/cpu and FOLDER/cuda get the programs of one model, fp32 with INT8 activations, FOLDER/cuda
also the kernels' sources. Its methods take their inputs in the reverse order: nothing may depend on
it. FOLDER/next gets the same of a small Qwen3-Next, whose embedding, experts and attention come
from a GPTQ checkpoint, with float16 scales, and whose other parts are INT8 with a scale per row;
its recurrent state is bfloat16, and it has the method `score`. FOLDER/long, with
ET_MOE_EXECUTED_REQUESTS set, is like FOLDER with sequences of three pages. FOLDER/small gets
programs with two methods of `lowering_methods`, cpu.pte and cuda.pte, weights of two kinds for
each, such as cuda.0.ptd, and kernels.json; FOLDER/rows the same with its method `rows`.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from checkpoints import GPTQ, SMALL_FOR_CUDA, to_gptq, write
from lowering_methods import EXPERT_WEIGHTS, OWN_POOL, Small, method, rows, scores
from safetensors.torch import load_file

from et_moe.backends.cpu import lowering
from et_moe.backends.cuda import backend as cuda
from et_moe.backends.cuda.build import scratch_folder
from et_moe.backends.cuda.triton.attention import prefill
from et_moe.backends.method_graph import MethodGraph
from et_moe.backends.sealed_file import LAYOUT, PtdWriter, write_sealed
from et_moe.examples.qwen3_5_moe.model import MODEL as QWEN3_5_MOE
from et_moe.examples.qwen3_next.model import MODEL as QWEN3_NEXT
from et_moe.pipeline import export
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.models import Model
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import choose_storages

MAX_PREFILL_TOKENS = 20
"""Short, so that a prompt of some tens of tokens takes several calls; more than the range for a few
tokens has, so that calls have the kernels for many, too."""

MAX_SEQ_LEN = 80
"""More than a page."""
LONG_SEQ_LEN = 144
"""More than two pages: a sequence is put back only where it has grown by two."""
SPLIT_TOKENS = 32
"""So few that attention of a prompt has several splits."""
MAX_SEQUENCES = 5
"""More than a power of two, so that calls are padded, too."""

DRAFT_TOKENS = int(os.environ.get("ET_MOE_DRAFT_TOKENS", "1"))
"""With 1 two sequences draft together, with 2 and 3 one alone."""
DRAFT_VOCABULARY = 37

# One layer has a dense MLP, the other a mixture whose weights do not add up to 1.
NEXT_FOR_CUDA = SMALL_FOR_CUDA | {
    "intermediate_size": 64,
    "mlp_only_layers": [0],
    "norm_topk_prob": False,
    "num_experts": 8,
}


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (dtype, shape) in EXPERT_WEIGHTS.items():
        if dtype.is_floating_point:
            weights[name] = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(dtype)
        else:
            limits = torch.iinfo(dtype)
            weights[name] = torch.randint(
                limits.min, limits.max, shape, generator=generator, dtype=dtype
            )
    return weights


def make_small(folder: Path, graphs: dict[str, MethodGraph]) -> None:
    """Programs of methods that share state and weights."""
    folder.mkdir(parents=True)
    compiled = cuda.lower(graphs, ["sm_90"], {}, None, OWN_POOL)
    (folder / "kernels.json").write_text(compiled.sidecar())
    for name, program in (("cpu", lowering.lower(graphs, {})), ("cuda", compiled)):
        write_sealed(folder / f"{name}.pte", program.pte)
        for seed in range(2):
            path, plan = folder / f"{name}.{seed}.ptd", program.plan
            with PtdWriter(path, plan.spec, {LAYOUT: plan.layout}) as writer:
                for key, tensor in plan.pack(_weights(seed)):
                    writer.write(key, tensor)


def _turned(methods):
    """A model's `methods` with their inputs in the opposite order: nothing may depend on it."""

    def turned(self, config, sizes):
        given = methods(self, config, sizes)
        return {name: replace(method, inputs=method.inputs[::-1]) for name, method in given.items()}

    return turned


def quantized_checkpoint(checkpoint: Path) -> Path:
    """A copy of the checkpoint with embedding, experts and attention as GPTQ stores them."""
    config = json.loads((checkpoint / "config.json").read_text())
    (file,) = checkpoint.glob("model-*.safetensors")
    names = ["embed_tokens.weight", *(f"self_attn.{p}_proj.weight" for p in "qkvo")]
    names += [f"experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")]
    stored, _ = to_gptq(load_file(file), tuple(names))
    section = {"quantization_config": GPTQ}
    return write(checkpoint.with_name("quantized"), config | section, stored)


def export_model(
    folder: Path,
    model: Model,
    overrides: dict[str, object],
    max_sequences: int,
    recipe: str = "4w",
    change: Callable[[Path], Path] = lambda checkpoint: checkpoint,
    **further: object,
) -> None:
    """A random model for the CPU and for CUDA, whose methods take their inputs turned around.

    further: options of the export.
    """
    further.setdefault("max_seq_len", MAX_SEQ_LEN)
    make_checkpoint(folder / "checkpoint", model, "tiny", seed=3, overrides=overrides)
    checkpoint = Checkpoint(change(folder / "checkpoint"))
    source = QuantizedCheckpoint(
        checkpoint, choose_storages(model.parts, group_size=32, recipe=recipe)
    )
    for backend in ("cpu", "cuda"):
        options = export.ExportOptions(
            backend=backend,
            dtype=torch.float32,
            max_sequences=max_sequences,
            cuda_archs=("sm_90",),
            debug_sidecar=backend == "cuda",
            **further,
        )
        kind = type(model)
        methods = _turned(kind.methods) if backend == "cuda" else kind.methods
        with mock.patch.object(kind, "methods", methods):
            export.export(source, folder / backend, options)


def of_few_tokens(checkpoint: Path) -> Path:
    """A copy of the checkpoint that draws few different tokens, which its head guesses often."""
    config = json.loads((checkpoint / "config.json").read_text())
    (file,) = checkpoint.glob("model-*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"][5:] = 0
    tensors["lm_head.weight"] *= 100
    return write(checkpoint.with_name("few tokens"), config, tensors)


def main() -> None:
    folder = Path(sys.argv[1])
    make_small(folder / "small", {"scores": scores(), "decode": method(Small(), decode=True)})
    make_small(folder / "rows", {"rows": rows()})
    export.MAX_PREFILL_TOKENS = MAX_PREFILL_TOKENS
    prefill.SPLIT_TOKENS = SPLIT_TOKENS
    export_model(folder, QWEN3_5_MOE, SMALL_FOR_CUDA, MAX_SEQUENCES)
    if "ET_MOE_EXECUTED_REQUESTS" in os.environ:
        longer = SMALL_FOR_CUDA | {"max_position_embeddings": LONG_SEQ_LEN}
        export_model(folder / "long", QWEN3_5_MOE, longer, 3, max_seq_len=LONG_SEQ_LEN)
    # Its ranges for more tokens, and for many sequences, would have the same kernels.
    export.MAX_PREFILL_TOKENS = 4
    with_head = SMALL_FOR_CUDA | {"mtp_num_hidden_layers": 1}
    drafting = {"draft_tokens": DRAFT_TOKENS, "draft_vocabulary": DRAFT_VOCABULARY}
    export_model(folder / "drafts", QWEN3_5_MOE, with_head, 3, change=of_few_tokens, **drafting)
    further = {"recurrent_state_dtype": torch.bfloat16, "score": True}
    mixed = (1, "mixed", quantized_checkpoint)
    export_model(folder / "next", QWEN3_NEXT, NEXT_FOR_CUDA, *mixed, **further)


if __name__ == "__main__":
    with scratch_folder():  # the programs have kernels in common
        main()
