"""Exports small models for the CPU and for CUDA: `python make_programs.py FOLDER`.

In a process of its own, as tests interpret kernels; with `tests` and `tests/backends/cuda` in
PYTHONPATH.

FOLDER/cpu and FOLDER/cuda get the programs of one model, fp32 with INT8 activations, FOLDER/cuda
also the kernels' sources. Its methods take their inputs in the reverse order: nothing may depend on
it. FOLDER/small gets programs with two methods of `lowering_methods`, cpu.pte and cuda.pte, weights
of two kinds for each, such as cuda.0.ptd, and kernels.json.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from checkpoints import SMALL_FOR_CUDA, storages
from lowering_methods import WEIGHTS, Small, method, scores

from et_moe.backends.cpu import lowering
from et_moe.backends.cuda import backend as cuda
from et_moe.backends.sealed_file import PtdWriter, write_sealed
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import export
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint

MAX_PREFILL_TOKENS = 16
"""Short, so that a prompt of some tens of tokens takes several calls."""


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (dtype, shape) in WEIGHTS.items():
        if dtype.is_floating_point:
            weights[name] = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(dtype)
        else:
            limits = torch.iinfo(dtype)
            weights[name] = torch.randint(
                limits.min, limits.max, shape, generator=generator, dtype=dtype
            )
    return weights


def make_small(folder: Path) -> None:
    """Two methods that share state and weights, one of which hands its token over."""
    folder.mkdir(parents=True)
    graphs = {"scores": scores(), "decode": method(Small(), decode=True)}
    compiled = cuda.lower(graphs, ["sm_90"], {}, None)
    (folder / "kernels.json").write_text(compiled.sidecar())
    for name, program in (("cpu", lowering.lower(graphs, {})), ("cuda", compiled)):
        write_sealed(folder / f"{name}.pte", program.pte)
        for seed in range(2):
            path, plan = folder / f"{name}.{seed}.ptd", program.plan
            with PtdWriter(path, plan.spec, plan.layout) as writer:
                for key, tensor in plan.pack(_weights(seed)):
                    writer.write(key, tensor)


def main() -> None:
    folder = Path(sys.argv[1])
    make_small(folder / "small")
    make_checkpoint(folder / "checkpoint", MODEL, "tiny", seed=3, overrides=SMALL_FOR_CUDA)
    source = QuantizedCheckpoint(Checkpoint(folder / "checkpoint"), storages("4w", 32, "8w"))
    export.MAX_PREFILL_TOKENS = MAX_PREFILL_TOKENS
    for backend in ("cpu", "cuda"):
        options = export.ExportOptions(
            backend=backend,
            dtype=torch.float32,
            max_seq_len=64,
            cuda_archs=("sm_90",),
            debug_sidecar=backend == "cuda",
        )
        inputs = {m: i[::-1] if backend == "cuda" else i for m, i in export.INPUTS.items()}
        with mock.patch.object(export, "INPUTS", inputs):
            export.export(source, folder / backend, options)


if __name__ == "__main__":
    main()
