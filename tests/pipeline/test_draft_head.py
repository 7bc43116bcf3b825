"""The shortened vocabulary of drafts: which rows a program gets, and what is refused."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from et_moe.pipeline.cli import app
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.draft_head import with_draft_head


def groups():
    yield {"embed_tokens.weight": torch.zeros(6, 2)}
    yield {"lm_head.weight": torch.arange(12).view(6, 2), "lm_head.scale": torch.arange(6)}
    yield {"mtp.norm.weight": torch.zeros(2)}


def test_the_first_rows_are_copied() -> None:
    given, (*before, head) = list(groups()), with_draft_head(groups(), 4)
    assert [list(group) for group in before] == [list(group) for group in given[:-1]]
    assert list(head) == ["mtp.norm.weight", "mtp.draft_head.weight", "mtp.draft_head.scale"]
    assert head["mtp.draft_head.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert head["mtp.draft_head.scale"].tolist() == [0, 1, 2, 3]


def test_without_a_shortened_vocabulary_nothing_changes() -> None:
    assert [list(group) for group in with_draft_head(groups(), 0)] == [*map(list, groups())]


REFUSED = {
    "--draft-tokens 1 --draft-vocabulary 513": "513: expected 0 to 512, the model's",
    "--draft-tokens 1 --draft-vocabulary -1": "-1: expected 0 to 512, the model's",
    "--draft-vocabulary 100": "100: expected --draft-tokens, too",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused(tmp_path: Path, flags: str) -> None:
    line = ["export", "--preset", "tiny", "--graph-only", *flags.split()]
    done = CliRunner().invoke(app, [*line, "--output-dir", str(tmp_path / "out")])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == f"--draft-vocabulary {REFUSED[flags]}"
    assert not (tmp_path / "out").exists()
