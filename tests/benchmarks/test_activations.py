"""The comparison of INT8 and bf16 activations: a small bundle, by references and by kernels."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoints import make_small, storages
from sequences import one_sequence

from et_moe.benchmarks import activations as tool
from et_moe.benchmarks.report import activations as report
from et_moe.examples.qwen3_5_moe.graph import Qwen3_5Moe
from et_moe.pipeline.bundle import Bundle, write_bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Precision

TOKENS = 24


def compare(bundle, packed=False, dtype=torch.float32) -> tuple[list[dict], dict]:
    ids = torch.randint(0, 264, (TOKENS,), generator=torch.Generator().manual_seed(3))
    comparison = tool.Comparison(Bundle(bundle), dtype, torch.device("cpu"), packed)
    with torch.no_grad():
        *layers, head = comparison.run(ids)
    return layers, head


def whole_model(bundle, activations: str, ids: torch.Tensor) -> torch.Tensor:
    """The next token after each prefix of `ids`, by the model that is exported."""
    source = Bundle(bundle)
    precision = Precision(source.storages, activations, torch.float32)
    model = Qwen3_5Moe(source.config, precision)
    tensors = {name: t for group in source.groups() for name, t in group.items()}
    model.load_state_dict(tensors)
    state, places = one_sequence(model, len(ids))
    one = torch.ones(1)
    tokens = []
    for i, token in enumerate(ids):
        options = (one * 0, torch.tensor([0]), one, torch.tensor([0]))
        given = (token.view(1, 1), torch.tensor([i]), *places.values(), *options)
        tokens.append(model(*given, state)[0].item())
    return torch.tensor(tokens)


def test_errors_are_those_of_int8_activations(tiny_bundle):
    layers, head = compare(tiny_bundle)
    assert [row["kind"] for row in layers] == ["linear_attention", "full_attention"]
    for row in layers:
        assert 0.002 < row["moe_error"] < 0.015  # the budget of W4A8
        assert 0 < row["hidden_error"] < 0.03
    assert 0 < head["logits_error"] < 0.05
    ids = torch.randint(0, 264, (TOKENS,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        same = whole_model(tiny_bundle, "int8", ids) == whole_model(tiny_bundle, "bf16", ids)
    assert head["top1_agreement"] == pytest.approx(same.double().mean().item())


def test_equal_activations_do_not_differ(tiny_bundle, monkeypatch):
    choose = tool.set_activations
    monkeypatch.setattr(tool, "set_activations", lambda module, dtype: choose(module, "bf16"))
    layers, head = compare(tiny_bundle)
    assert all(row["moe_error"] == row["hidden_error"] == 0 for row in layers)
    assert head == {"top1_agreement": 1.0, "logits_error": 0.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run for real, on CUDA tensors")
def test_kernels_find_what_the_references_find(tmp_path):
    """Takes the path of a GPU, with the kernels under Triton's interpreter and dimensions that they
    accept."""
    make_small(tmp_path / "checkpoint", linear_key_head_dim=16, linear_value_head_dim=32)
    source = QuantizedCheckpoint(Checkpoint(tmp_path / "checkpoint"), storages("4w", 32, "8w"))
    write_bundle(source, tmp_path / "bundle")
    expected, head = compare(tmp_path / "bundle")
    with tool.triton_kernels("CPU"):
        layers, packed_head = compare(tmp_path / "bundle", packed=True)
    for row, reference in zip(layers, expected, strict=True):
        assert row["moe_error"] == pytest.approx(reference["moe_error"], rel=0.1)
        assert row["hidden_error"] == pytest.approx(reference["hidden_error"], rel=0.1)
    assert packed_head["logits_error"] == pytest.approx(head["logits_error"], rel=0.1)
    assert abs(packed_head["top1_agreement"] - head["top1_agreement"]) <= 2 / TOKENS


def test_command(tiny_bundle, tmp_path):
    out = tmp_path / "results" / "activations.json"
    command = [sys.executable, "-m", "et_moe.benchmarks", "activations", "--bundle", tiny_bundle]
    command += ["--out", out, "--tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    layers = result["layers"]
    assert [row["layer"] for row in layers] == [0, 1] and result["tokens"] == 20
    text = "\n".join(report.section(result))
    assert f"likeliest token at {result['top1_agreement']:.1%} of the positions" in text
    errors = [row["moe_error"] for row in layers]
    figures = (sum(errors) / 2, max(errors), layers[1]["hidden_error"])
    assert f"| 0 to 1 | {' | '.join(f'{figure:.2%}' for figure in figures)} |" in text


def test_a_bad_bundle_is_one_line(tmp_path):
    command = [sys.executable, "-m", "et_moe.benchmarks", "activations", "--bundle", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}")
    assert done.stderr.count("\n") == 1


def test_a_bundle_without_int4_is_refused(tiny_checkpoint, tmp_path):
    checkpoint = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), storages("none", 32, "8w"))
    write_bundle(checkpoint, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(tmp_path / "bundle")


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        tool.relative_error(torch.tensor([1.0]), torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="zero"):
        tool.relative_error(torch.tensor([1.0]), torch.zeros(1))
