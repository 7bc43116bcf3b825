"""The chat in a terminal, over a fake engine and over a real program."""

import asyncio
import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console
from served_app import DEMO

from et_moe.serving.engine import AsyncEngine
from et_moe.serving.served_model import ServedModel
from et_moe.serving.terminal_chat import TerminalChat


@pytest.fixture
def chat(engine, tokenizer):
    """Types lines and returns what the terminal shows; a function is called on the way."""

    def run(*inputs) -> str:
        console = Console(file=io.StringIO(), width=100)
        rest = list(inputs)

        async def read() -> str:
            if not rest:
                raise EOFError
            if callable(rest[0]):
                rest.pop(0)()
            return rest.pop(0)

        async def talk() -> None:
            model = ServedModel.make("demo", AsyncEngine(engine), tokenizer, DEMO)
            await TerminalChat(model, console, read).run()
            await model.engine.close()

        asyncio.run(talk())
        return console.file.getvalue()

    return run


def prompts(engine, tokenizer) -> list[str]:
    return [b"".join(map(tokenizer.id_to_bytes, p)).decode() for p, _ in engine.submitted]


def test_a_conversation(chat, engine, tokenizer, tmp_path: Path) -> None:
    engine.text = "hm\n</think>\n\nHello [b]you[/b]."
    file = tmp_path / "saved.json"
    shown = chat("Hi", "", "/system Be brief.", "And?\nNow?", f"/save {file}")
    assert shown.startswith("demo: 4 sequences at once, a KV cache of 512 tokens\n/help says")
    assert shown.count("hm\n\nHello [b]you[/b].\n") == 2
    assert shown.count("tokens/s") == 2 and "the first after" in shown and f"wrote {file}" in shown
    first, second = prompts(engine, tokenizer)
    assert first.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert second == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello [b]you[/b].<|im_end|>\n"
        "<|im_start|>user\nAnd?\nNow?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    answer = {"role": "assistant", "content": "Hello [b]you[/b].", "reasoning_content": "hm"}
    saved = json.loads(file.read_text())
    assert saved[0] == {"role": "system", "content": "Be brief."} and saved[2] == saved[4] == answer


def test_commands(chat, engine, tokenizer, tmp_path: Path) -> None:
    engine.text = "Yes."
    shown = chat("/think", "Hi", "/clear", "/think", "Ho", "/save", f"/save {tmp_path}", "/what")
    first, second = prompts(engine, tokenizer)
    assert first.endswith("<think>\n\n</think>\n\n") and second.endswith("<think>\n")
    assert "Hi" not in second
    assert "thinking is off" in shown and "name of the file is missing" in shown
    assert "Is a directory" in shown and "/what: unknown" in shown


def test_what_cannot_be_answered(chat, engine, tokenizer) -> None:
    """The error is shown, and the message is no part of the conversation that goes on."""
    shown = chat("word " * 3000, lambda: setattr(engine, "text", "</think>Fine."), "Hi")
    assert "error: the prompt has" in shown and "Fine." in shown
    assert "word" not in prompts(engine, tokenizer)[-1]
    engine.fail_next = "no luck"
    assert "error: no luck" in chat("Hi")


@pytest.mark.parametrize(
    ("path", "fault"),
    [("~no one/x", "home directory"), ("a\0b", "null byte"), ("/", "s a directory")],
)
def test_a_file_that_cannot_be_written(chat, engine, path: str, fault: str) -> None:
    engine.text = "</think>Fine."
    shown = chat(f"/save {path}", "Hi")
    assert fault in shown and "wrote" not in shown and "Fine." in shown


def test_what_is_no_character(chat, engine, tokenizer, tmp_path: Path) -> None:
    engine.text = "</think>Fine."
    assert "Fine." in chat("a\udcffb", f"/save {tmp_path / 'saved.json'}")
    assert "user\na?b<" in prompts(engine, tokenizer)[0]
    assert json.loads((tmp_path / "saved.json").read_text())[0]["content"] == "a?b"


@pytest.mark.parametrize("redirected", ["< lines", "<&-"])
def test_input_that_is_no_text_or_not_there(tmp_path: Path, redirected: str) -> None:
    (tmp_path / "lines").write_bytes(b"h\xffi\n")
    shell = f'exec "$0" -c "$1" {redirected}'
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, TALK.replace("* 500", "* 5")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s") == (redirected == "< lines")


def test_control_characters_of_an_answer_do_not_reach_the_terminal(chat, engine) -> None:
    engine.text = "</think>a\x1b[2Jb\x07\x9bc\td\ne"
    shown = chat("Hi")
    assert "a\ufffd[2Jb\ufffd\ufffdc" in shown and "\x1b[2J" not in shown


TALK = """
import asyncio, sys
from fake_engine import FakeEngine
from served_app import DEMO
from et_moe.runner.python import Tokenizer
from et_moe.serving.engine import AsyncEngine
from et_moe.serving.served_model import ServedModel
from et_moe.serving.terminal_chat import terminal_chat

tokenizer = Tokenizer(str(DEMO / "tokenizer.json"))
answer = [*tokenizer.encode("</think>" + " word" * 500, True), 2045]
engine = FakeEngine(lambda *_: answer, seconds=0.01)

async def open_model():
    return ServedModel.make("demo", AsyncEngine(engine), tokenizer, DEMO)

asyncio.run(terminal_chat(open_model))
"""


def test_keys_at_a_terminal() -> None:
    """Alt+Enter begins a line, Ctrl-C ends an answer but nothing else, Ctrl-D ends the program."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", TALK], cwd=Path(__file__).parent, stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True, env=environment,
    )  # fmt: skip
    os.close(terminal)
    shown = ""
    prompt = "\x1b[?2004h"  # asks the terminal for bracketed paste, as each prompt does at first

    def wait_for(text: str, count: int = 1) -> None:
        nonlocal shown
        while shown.count(text) < count:
            shown += os.read(main, 4096).decode(errors="replace")

    try:
        wait_for(prompt)
        os.write(main, b"one\x1b\rtwo")
        wait_for("two")
        os.write(main, b"\r")
        wait_for("word word word")
        os.kill(process.pid, signal.SIGINT)
        wait_for("stopped: ")
        wait_for(prompt, 2)
        os.write(main, b"again\r")
        wait_for("word word word", shown.count("word word word") + 1)
        os.kill(process.pid, signal.SIGINT)
        wait_for(prompt, 3)
        os.write(main, b"\x03")
        wait_for(prompt, 4)
        os.write(main, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_a_real_program(tiny_program: Path) -> None:
    """Without a chat template it says so, in one line."""
    done = subprocess.run(
        ["et-moe", "chat", tiny_program], input="Hi\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: tiny_program: no chat template: copy chat_template.jinja")
    assert len(done.stderr.splitlines()) == 1
