"""What is said of a folder that is not a program's."""

from pathlib import Path

import pytest

from et_moe.serving import cli
from et_moe.serving.llm import LLM


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, kind in (("missing", "no such folder"), ("file", "not a folder")):
        for load in (LLM, lambda folder: cli._model_opener(folder, None)):
            with pytest.raises(ValueError, match=f"{name}: {kind}, expected one that `et-moe exp"):
                load(tmp_path / name)
