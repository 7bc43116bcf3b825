"""What the server costs beside the runner: what the command measures."""

import json
from pathlib import Path

import pytest

from et_moe.benchmarks import overhead
from et_moe.benchmarks.batch import Load
from et_moe.benchmarks.report import overhead as report
from et_moe.benchmarks.shape import model_shape


@pytest.fixture
def without_tokenizer(tiny_program: Path, tmp_path: Path) -> Path:
    """The program as `export --graph-only` leaves one of random weights."""
    for name in ("model.pte", "model.ptd"):
        (tmp_path / name).symlink_to(tiny_program / name)
    return tmp_path


def test_rows(runner, without_tokenizer, tiny_checkpoint, tmp_path: Path) -> None:
    out, shape = tmp_path / "overhead.json", model_shape(tiny_checkpoint)
    loads = [Load(1, 1, 10, 8), Load(2, 3, 10, 8)]
    assert overhead.measure(runner.binary, without_tokenizer, loads, shape, out)
    rows = json.loads(out.read_text())["rows"]
    for row in rows:
        for by in ("runner", "server"):
            assert row[by]["output_token_per_sec"] > 0
            assert row[by]["time_to_first_token_ms_median"] > 0
        assert row["server"]["generated_tokens"] == row["runner"]["generated_tokens"]
        assert row["server"]["cpu_us_per_token"] >= 0
    lines = report.section(json.loads(out.read_text()))
    assert sum("| output tok/s | " in line for line in lines) == 2


def test_a_failure_is_kept(runner, without_tokenizer, tiny_checkpoint, tmp_path: Path) -> None:
    """The prompt and its answer do not fit the context."""
    out, shape = tmp_path / "overhead.json", model_shape(tiny_checkpoint)
    assert not overhead.measure(runner.binary, without_tokenizer, [Load(1, 1, 1000, 8)], shape, out)
    (row,) = json.loads(out.read_text())["rows"]
    assert "context" in row["error"] and row["error"] in report.cells(row)[0]
