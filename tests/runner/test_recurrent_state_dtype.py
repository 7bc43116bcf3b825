"""Programs whose recurrent state is bfloat16, against the eager reference."""

import dataclasses
from pathlib import Path

import torch
from checkpoints import storages
from test_w4a8 import eager_logits

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint

FLOAT32 = ExportOptions(max_seq_len=64, activation_dtype="bf16", max_sequences=2)
BFLOAT16 = dataclasses.replace(FLOAT32, recurrent_state_dtype=torch.bfloat16)


def test_logits_agree_with_the_eager_reference(runner, tmp_path: Path) -> None:
    """And differ from those of a state of float32."""
    make_checkpoint(tmp_path / "checkpoint", MODEL, "tiny", 5)
    source = QuantizedCheckpoint(Checkpoint(tmp_path / "checkpoint"), storages("4w", 32, "8w"))
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    errors = []
    for options, folder in ((BFLOAT16, tmp_path / "bfloat16"), (FLOAT32, tmp_path / "float32")):
        export(source, folder, options)
        logits = runner.logits(folder, ids)
        expected = eager_logits(source, torch.float32, ids, "bf16", torch.bfloat16)
        errors.append((logits - expected).norm() / expected.norm())
    assert errors[0] < 1e-4 < errors[1] < 1e-3, errors
