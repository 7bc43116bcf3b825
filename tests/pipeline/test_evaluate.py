"""Scoring a text with two models, without a program: the runner's logits are given."""

from pathlib import Path

import torch
from checkpoints import make_small

from et_moe.pipeline import evaluate


def test_a_model_of_linear_layers_only(tmp_path: Path, monkeypatch) -> None:
    """The cache of transformers knows no length without a layer of full attention."""
    make_small(tmp_path / "checkpoint", layer_types=["linear_attention", "linear_attention"])
    (tmp_path / "text").write_text("some text of more than one window")
    uniform = lambda runner, program, ids: torch.zeros(len(ids) - 1, 264)  # noqa: E731
    monkeypatch.setattr(evaluate, "runner_logits", uniform)
    result = evaluate.evaluate(
        tmp_path / "checkpoint", tmp_path, tmp_path / "text", Path("runner"), window=16
    )
    assert result.tokens > 20 and abs(result.perplexity - 264) < 0.01
