"""What is said of a folder that is not a program's, and folders whose names are no UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from et_moe.serving.engine import load_engine, load_tokenizer
from et_moe.serving.llm import LLM
from et_moe.serving.served_model import model_opener


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, kind in (("missing", "no such folder"), ("file", "not a folder")):
        for load in (LLM, lambda folder: model_opener(folder, None)):
            with pytest.raises(ValueError, match=f"{name}: {kind}, expected one that `et-moe exp"):
                load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("chat_template.jinja", b"{% for x in %}", "line 1: Expected an expression"),
        ("chat_template.jinja", b"\xff", "can't decode"),
        ("tokenizer_config.json", b"[", "Expecting value"),
        ("generation_config.json", b'{"temperature": -1}', "temperature -1: expected"),
    ],
)
def test_a_file_that_is_damaged_is_named(
    tiny_program: Path, tmp_path: Path, monkeypatch, name: str, content: bytes, fault: str
) -> None:
    """Before the model is loaded, by all that load one."""
    for file in tiny_program.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_bytes(content)
    for module in ("served_model", "llm"):
        monkeypatch.setattr(f"et_moe.serving.{module}.load_engine", None)
    for load in (LLM, lambda folder: model_opener(folder, None)):
        with pytest.raises(ValueError, match=f"{name}: .*{fault}"):
            load(tmp_path)


NAMES = [b"n\xff", "n\u00f6".encode()]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_the_locale_does_not_have(tiny_program: Path, tmp_path: Path, name) -> None:
    """Errors are one line, also where nothing but ASCII can be printed."""
    (tmp_path / os.fsdecode(name)).mkdir()
    command = [sys.executable, "-c", "from et_moe.cli import main; main()", "chat", name]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    shown = ascii(name.decode("ascii", "surrogateescape"))[1:-1].encode()
    assert done.stderr == b"error: " + shown + (
        b"/tokenizer.json: no such file; `et-moe export` copies it if the checkpoint has one, so "
        b"copy the model's into this folder\n"
    )
    assert done.returncode == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_program_in_a_folder_of_any_name(tiny_program: Path, tmp_path: Path, name) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.symlink_to(tiny_program)
    assert load_tokenizer(folder).vocab_size > 0
    engine = load_engine(folder, max_sequences=1)
    assert engine.info.vocab_size > 0
    engine.close()
    with pytest.raises(RuntimeError) as raised:
        load_engine(folder / "missing")
    assert str(raised.value).startswith(f"{folder}/missing/model.pte: ")
