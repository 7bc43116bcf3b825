"""`--draft-tokens`: what a program gets of it, and which ones are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import make_small, storages, write

from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.pipeline import export as exporter
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.export import ExportOptions
from et_moe.pipeline.models import MTP
from et_moe.pipeline.quantize import QuantizedCheckpoint


def source_of(checkpoint: Path) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(Checkpoint(checkpoint), storages("4w", 32, "8w"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """Of a model with a head."""
    directory = tmp_path_factory.mktemp("drafts") / "checkpoint"
    make_small(directory, mtp_num_hidden_layers=1)
    return source_of(directory)


def options(drafts: int) -> ExportOptions:
    return ExportOptions(max_seq_len=60, max_sequences=3, draft_tokens=drafts)


@pytest.mark.parametrize("drafts", [-1, 4])
def test_numbers_that_there_are_not(source, drafts: int) -> None:
    with pytest.raises(ConfigError, match=rf"^--draft-tokens {drafts}: expected 0 to 3$"):
        exporter.plan_weights(source, options(drafts))


def test_a_configuration_without_a_head(tiny_checkpoint: Path) -> None:
    message = r"^--draft-tokens 2: the model has no head .*mtp_num_hidden_layers .*expected 0$"
    with pytest.raises(ConfigError, match=message):
        exporter.plan_weights(source_of(tiny_checkpoint), options(2))


def test_weights_without_a_head(source, tmp_path: Path) -> None:
    """The configuration speaks of one, as of checkpoints whose head was left out."""
    config, tensors = make_small(tmp_path / "checkpoint", mtp_num_hidden_layers=1)
    rest = {name: t for name, t in tensors.items() if not name.startswith(MTP)}
    assert len(rest) < len(tensors)
    directory = write(tmp_path / "without", config, rest)
    with pytest.raises(ConfigError, match=r"^--draft-tokens 1: the model has no head"):
        exporter.plan_weights(source_of(directory), options(1))


def test_weights_are_those_that_the_methods_take(source) -> None:
    """The state has as many versions as a call has rows."""
    without, with_drafts = (exporter._graphs(source, options(k)) for k in (0, 2))
    for (graphs, constants), drafts in ((without, 0), (with_drafts, 2)):
        names = {"prefill", "decode", "decode_batch"}
        names |= {"draft_decode", "draft_decode_batch"} if drafts else set()
        assert set(graphs) == names
        assert constants.get("get_draft_tokens", 0) == drafts
        assert constants.get("get_draft_sequences", 0) == (3 if drafts else 0)
        assert constants["get_max_pages"] == (60 + 2 * drafts + 63) // 64
        for graph in graphs.values():
            assert any(name.startswith(MTP) for name in graph.weights) == bool(drafts)
            assert ("versions" in graph.inputs) == bool(drafts)
            nodes = graph.input_nodes()
            for name in graph.state:
                shape = nodes[name].meta["val"].shape
                if name == "mtp.hidden" or name.endswith("recurrent_state"):
                    assert (shape[1] == 1 + drafts and len(shape) in (3, 5)) == bool(drafts)
                if name.endswith("conv_state"):
                    assert shape[1] == 3 + drafts
    graph = with_drafts[0]["draft_decode_batch"]
    assert [str(size) for size in graph.output_values()["step"].shape][1:] == ["4"]


@pytest.mark.parametrize(("k", "sequences"), [(1, 2), (2, 1), (3, 1)])
def test_on_cuda_a_call_has_as_many_rows_as_have_the_bits_of_one(source, k, sequences) -> None:
    graphs, constants = exporter._graphs(source, replace(options(k), backend="cuda"))
    assert constants["get_draft_sequences"] == sequences
    assert ("draft_decode_batch" in graphs) == (sequences > 1)
    if sequences > 1:
        tokens = graphs["draft_decode_batch"].input_nodes()["tokens"].meta["val"]
        assert tokens.shape == (sequences, 1 + k)
    assert exporter.MAX_CUDA_DRAFT_ROWS == LINEAR_ROWS


def test_the_fingerprint_says_how_many(source) -> None:
    texts = [json.loads(exporter.fingerprint(source, options(k))) for k in range(4)]
    assert [text.pop("draft_tokens", 0) for text in texts] == [0, 1, 2, 3]
    assert all(text == texts[0] for text in texts)
