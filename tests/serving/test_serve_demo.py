"""`et-moe serve` with the demo model, as a newcomer has it."""

import shutil
from pathlib import Path

from test_server import Server, assert_conforms

from et_moe.benchmarks.clients import measure


def test_the_conformance_suite_of_executorch(demo_program: Path, tmp_path: Path) -> None:
    """All but what a model has to decide, to call a tool, which the scripted engine does in
    test_server.py. Answers have to be long enough to have content, so there is no thinking."""
    program = shutil.copytree(demo_program, tmp_path / "demo")
    template = program / "chat_template.jinja"
    template.write_text("{%- set enable_thinking = false -%}\n" + template.read_text())
    server = Server("et-moe", "serve", program, "--port", "0")
    try:
        assert_conforms(
            server.url, 6, "--deselect=test_openai_contract.py::test_tool_call_response_shape"
        )
    finally:
        server.stop()


def test_clients_that_come_and_go(demo_program: Path, capfd) -> None:
    """In short; `python -m et_moe.benchmarks clients` has 500 for ten minutes."""
    assert measure(demo_program, clients=40, seconds=6, seed=0), capfd.readouterr().out
    assert " right" in capfd.readouterr().out
