"""Exports with a recurrent state of float32 or bfloat16."""

import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoints import storages

from et_moe.backends.method_graph import SLOTS
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, build_graphs, fingerprint, resolve_sizes
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Precision

FLOAT32 = ExportOptions(max_seq_len=64, max_sequences=2)
BFLOAT16 = dataclasses.replace(FLOAT32, recurrent_state_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> QuantizedCheckpoint:
    checkpoint = tmp_path_factory.mktemp("state") / "checkpoint"
    make_checkpoint(checkpoint, MODEL, "tiny", 5, overrides={"mtp_num_hidden_layers": 1})
    return QuantizedCheckpoint(Checkpoint(checkpoint), storages("4w", 32, "8w"))


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_state_of_every_method(source, drafts: int) -> None:
    options = dataclasses.replace(BFLOAT16, draft_tokens=drafts)
    precision = Precision(source.storages, "bf16", torch.float32, torch.bfloat16)
    config = dataclasses.replace(source.config, mtp_num_hidden_layers=int(drafts > 0))
    graphs = build_graphs(config, precision, resolve_sizes(config, options))
    for graph in graphs.values():
        nodes = graph.input_nodes()
        slots = [name for name, pool in graph.state.items() if pool == SLOTS]
        found = {name: nodes[name].meta["val"].dtype for name in slots}
        recurrent = [name for name in found if name.endswith("recurrent_state")]
        assert recurrent and all(found.pop(name) == torch.bfloat16 for name in recurrent)
        assert set(found.values()) == {torch.float32}


def test_weights_are_those_of_the_other(source) -> None:
    assert fingerprint(source, BFLOAT16) == fingerprint(source, FLOAT32)


def test_flag(run, tiny_bundle: Path, tmp_path: Path) -> None:
    flags = ("export", "--prequantized", tiny_bundle, "--max-seq-len", 32, "--graph-only")
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        code, _, _ = run(*flags, "--recurrent-state-dtype", dtype, "--output-dir", folder)
        state = f'"name": "layers.0.linear_attn.recurrent_state", "dtype": "{dtype}"'
        assert code == 0 and state.encode() in (folder / "model.pte").read_bytes()
    code, _, error = run(*flags, "--recurrent-state-dtype", "float16", "--output-dir", folder)
    assert code == 2 and "--recurrent-state-dtype" in error and "bfloat16" in error
