"""Random bundles: readable, seeded, and with activations that stay finite."""

import os
from pathlib import Path

import pytest
import torch
from sequences import one_sequence

from et_moe.backends import ops
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.make_bundle import WEIGHT_RMS, RandomWeights, make_bundle
from et_moe.pipeline.quantize import meta_graph
from et_moe.pipeline.storage import Int4, Precision


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for group in Bundle(directory).groups() for name, t in group.items()}


def test_same_seed_same_bytes_whatever_the_number_of_layers(tmp_path: Path) -> None:
    make_bundle(tmp_path / "a", MODEL, "tiny", 3)
    make_bundle(tmp_path / "b", MODEL, "tiny", 3, layers=2)
    make_bundle(tmp_path / "c", MODEL, "tiny", 4, layers=2)
    a, b, c = (_weights(tmp_path / name) for name in "abc")
    assert b.keys() < a.keys()
    for name, tensor in b.items():
        assert torch.equal(tensor, a[name]), name
    assert not torch.equal(b["lm_head.weight"], c["lm_head.weight"])


def test_same_seed_same_bytes_whatever_the_number_of_threads(tmp_path: Path, monkeypatch) -> None:
    for cores in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        make_bundle(tmp_path / f"{cores}", MODEL, "tiny", 3, layers=2)
    a, b = (_weights(tmp_path / name) for name in "15")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_values_are_spread(tmp_path: Path) -> None:
    """Every byte of an INT4 weight occurs; dequantized weights have the published scale."""
    make_bundle(tmp_path, MODEL, "tiny", 3, layers=1)
    weights = _weights(tmp_path)
    name = "layers.0.mlp.experts.w13"
    counts = torch.bincount(weights[name].flatten().long(), minlength=256)
    assert (counts - counts.float().mean()).abs().max() < counts.float().mean() / 2
    rms = ops.dequantize_w4(weights[name], weights[f"{name}_scale"], 128).square().mean().sqrt()
    assert abs(rms / WEIGHT_RMS - 1) < 0.1


def test_a_random_embedding_in_int4(tmp_path: Path) -> None:
    make_bundle(tmp_path, MODEL, "tiny", 3, layers=1)
    bundle = Bundle(tmp_path)
    chosen = {**bundle.storages, "embedding": Int4(32)}
    weights = next(RandomWeights(tmp_path, bundle.config, chosen, 3).groups())
    table = ops.dequantize_w4(weights["embed_tokens.weight"], weights["embed_tokens.scale"], 32)
    assert abs(table.square().mean().sqrt() / WEIGHT_RMS - 1) < 0.1


def test_an_existing_bundle_is_kept(tmp_path: Path) -> None:
    make_bundle(tmp_path, MODEL, "tiny", 3, layers=1)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a config\.json"):
        make_bundle(tmp_path, MODEL, "tiny", 4, layers=1)
    assert (tmp_path / "config.json").read_bytes() == before


def test_logits_are_finite_and_spread(tmp_path: Path) -> None:
    make_bundle(tmp_path, MODEL, "tiny", 0)
    bundle = Bundle(tmp_path)
    model = meta_graph(bundle.config, Precision(bundle.storages, dtype=torch.float32))
    state, places = one_sequence(model, 32)
    zero, one = torch.zeros(1), torch.ones(1)
    integer = torch.zeros(1, dtype=torch.int64)
    sampling = (zero, integer, one, integer)
    arguments = (torch.arange(9)[None], integer, *places.values(), *sampling, state, integer + 9)
    _, logits = torch.func.functional_call(model, _weights(tmp_path), arguments)
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
