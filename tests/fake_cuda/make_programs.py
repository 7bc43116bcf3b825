"""Exports a small model for the CPU and for CUDA: `python make_programs.py FOLDER`.

In a process of its own, as tests interpret kernels; with the folder `tests` in PYTHONPATH.
FOLDER/cpu and FOLDER/cuda get the programs, fp32 with INT8 activations, FOLDER/cuda also the
kernels' sources.
"""

import sys
from pathlib import Path

import torch
from checkpoints import SMALL_FOR_CUDA, storages

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import export
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint

MAX_PREFILL_TOKENS = 16
"""Short, so that a prompt of some tens of tokens takes several calls."""


def main() -> None:
    folder = Path(sys.argv[1])
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
        export.export(source, folder / backend, options)


if __name__ == "__main__":
    main()
