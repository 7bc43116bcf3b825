"""Clients of the demo model that come and go."""

from pathlib import Path

from et_moe.benchmarks.clients import measure


def test_clients_that_come_and_go(demo_program: Path, capfd) -> None:
    """In short; `python -m et_moe.benchmarks clients` has 500 for ten minutes."""
    assert measure(demo_program, clients=40, seconds=6, seed=0), capfd.readouterr().out
    assert " right" in capfd.readouterr().out
