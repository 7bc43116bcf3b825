"""Options of `et-moe serve` that are refused, before anything is loaded."""

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--drain-seconds", "inf", "less than or equal to 86400"),
        ("--drain-seconds", "-1", "greater than or equal to 0"),
        ("--max-waiting", "9" * 23, "less than or equal to 1048576"),
        ("--max-sequences", "9" * 23, "less than or equal to 1048576"),
        ("--max-sequences", "0", "greater than or equal to 1"),
    ],
)
def test_a_value_out_of_range(tmp_path: Path, option: str, value: str, expected: str) -> None:
    command = ["et-moe", "serve", tmp_path, option, value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {option}: ") and expected in done.stderr, done.stderr
