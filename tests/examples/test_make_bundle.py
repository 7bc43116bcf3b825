"""Random bundles: readable, seeded, and with activations that stay finite."""

from pathlib import Path

import pytest
import torch

from et_moe.examples.qwen3_5_moe.bundle import Bundle
from et_moe.examples.qwen3_5_moe.config import ConfigError
from et_moe.examples.qwen3_5_moe.make_bundle import make_bundle
from et_moe.examples.qwen3_5_moe.model import Qwen3_5Moe


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for group in Bundle(directory).groups() for name, t in group.items()}


def test_same_seed_same_bytes_whatever_the_number_of_layers(tmp_path: Path) -> None:
    make_bundle(tmp_path / "a", "tiny", 3)
    make_bundle(tmp_path / "b", "tiny", 3, layers=2)
    make_bundle(tmp_path / "c", "tiny", 4, layers=2)
    a, b, c = (_weights(tmp_path / name) for name in "abc")
    assert b.keys() < a.keys()
    for name, tensor in b.items():
        assert torch.equal(tensor, a[name]), name
    assert not torch.equal(b["lm_head.weight"], c["lm_head.weight"])


def test_an_existing_bundle_is_kept(tmp_path: Path) -> None:
    make_bundle(tmp_path, "tiny", 3, layers=1)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a config\.json"):
        make_bundle(tmp_path, "tiny", 4, layers=1)
    assert (tmp_path / "config.json").read_bytes() == before


def test_logits_are_finite_and_spread(tmp_path: Path) -> None:
    make_bundle(tmp_path, "tiny", 0)
    bundle = Bundle(tmp_path)
    with torch.device("meta"):
        model = Qwen3_5Moe(bundle.config, bundle.quantization, torch.float32)
    state = {n: torch.zeros(shape, dtype=d) for n, (d, shape) in model.state_spec(32).items()}
    zero, one = torch.zeros(1), torch.ones(1)
    integer = torch.zeros(1, dtype=torch.int64)
    arguments = (torch.arange(9)[None], integer, integer + 9, zero, integer, one, integer, state)
    _, logits = torch.func.functional_call(model, _weights(tmp_path), arguments)
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
