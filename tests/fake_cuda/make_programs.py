"""Exports a small model for the CPU and for CUDA: `python make_programs.py FOLDER`.

In a process of its own, as tests interpret kernels. FOLDER/cpu and FOLDER/cuda get the programs,
fp32 with INT8 activations, FOLDER/cuda also the kernels' sources.
"""

import sys
from pathlib import Path

import torch

from et_moe.examples.qwen3_5_moe import export
from et_moe.examples.qwen3_5_moe.bundle import QuantizedCheckpoint
from et_moe.examples.qwen3_5_moe.checkpoint import Checkpoint
from et_moe.examples.qwen3_5_moe.make_checkpoint import make_checkpoint
from et_moe.examples.qwen3_5_moe.model import Quantization

MAX_PREFILL_TOKENS = 16
"""Short, so that a prompt of some tens of tokens takes several calls."""

# A layer of each kind; the smallest sizes that the kernels take.
CONFIG = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128,
    "layer_types": ["linear_attention", "full_attention"],
}


def main() -> None:
    folder = Path(sys.argv[1])
    make_checkpoint(folder / "checkpoint", "tiny", seed=3, overrides=CONFIG)
    source = QuantizedCheckpoint(Checkpoint(folder / "checkpoint"), Quantization("4w", 32, "8w"))
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
