"""A chat in the terminal: answers appear as they are written, and Ctrl-C ends an answer only."""

import asyncio
import io
import json
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console

from et_moe.serving.generation import GenerationError
from et_moe.serving.interface import QueueFullError, SamplingParams
from et_moe.serving.output_parser import Content, OutputParser, Part, Reasoning
from et_moe.serving.reasoning import opens_reasoning
from et_moe.serving.served_model import ServedModel
from et_moe.serving.steps import Step

HELP = """\
Enter sends, Alt+Enter begins a new line, Ctrl-C ends an answer, Ctrl-D ends the program.
/think          thinking on or off
/system [TEXT]  what the model is told before the conversation; nothing without TEXT
/clear          a new conversation
/save FILE      writes the conversation as JSON
/help           this text"""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that could move the cursor or change the terminal; a model may write them."""


@dataclass
class Speed:
    """How fast an answer came."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def add(self, count: int) -> None:
        self.last = time.monotonic()
        if self.first is None and count:
            self.first = self.last
        self.tokens += count

    def __str__(self) -> str:
        if self.first is None:
            return "no tokens"
        text = f"{self.tokens} tokens, the first after {1000 * (self.first - self.started):.0f} ms"
        if self.last > self.first:
            text += f", {(self.tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return text


@dataclass
class Conversation:
    """What was said, and how the next answer is to be made."""

    model: ServedModel
    system: str = ""
    thinking: bool = True
    turns: list[dict] = field(default_factory=list)

    def messages(self) -> list[dict]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    async def answer(self, text: str, speed: Speed) -> AsyncIterator[Part]:
        """The parts of the answer to `text`. Both are remembered once they have begun, also if the
        answer is not used up; nothing is if it cannot begin.

        Raises:
            ValueError: the conversation is too long, or the template refuses it.
            GenerationError: the engine failed.
        """
        turn = {"role": "user", "content": text}
        prompt = self.model.template.render([*self.messages(), turn], enable_thinking=self.thinking)
        ids = self.model.tokenizer.encode(prompt, True)
        params = replace(SamplingParams(**self.model.defaults), seed=random.getrandbits(63))
        [generation] = self.model.start([ids], [params])
        parser = OutputParser(opens_reasoning(prompt))
        said = {"role": "assistant", "content": ""}
        self.turns += [turn, said]
        try:
            async for event in generation.events():
                speed.add(len(event.token_ids))
                for part in _parts(parser, generation.steps(event)):
                    key = "content" if isinstance(part, Content) else "reasoning_content"
                    said[key] = said.get(key, "") + part.text
                    yield part
        finally:
            generation.close()


def _parts(parser: OutputParser, steps: Iterator[Step]) -> Iterator[Part]:
    for step in steps:
        yield from parser.feed(step.text)
        if step.finish_reason is not None:
            yield from parser.finish(complete=step.finish_reason != "length")


class TerminalChat:
    """Reads what a person says and shows what the model answers.

    Args:
        read: the next input; raises EOFError at the end and KeyboardInterrupt for Ctrl-C.
    """

    def __init__(
        self, model: ServedModel, console: Console, read: Callable[[], Awaitable[str]]
    ) -> None:
        self._conversation = Conversation(model)
        self._console, self._read = console, read

    async def run(self) -> None:
        """Until the input ends."""
        model = self._conversation.model
        engine = model.engine.engine
        self._note(f"{model.name}: {engine.status().capacity(engine.info)}")
        self._note("/help says what can be typed")
        while True:
            try:
                # What is no character, as half of one that was pasted, has no tokens.
                text = (await self._read()).encode(errors="replace").decode().strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                await self._answer(text)

    def _note(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False, highlight=False)

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        conversation, argument = self._conversation, argument.strip()
        if name == "/think":
            conversation.thinking = not conversation.thinking
            self._note(f"thinking is {'on' if conversation.thinking else 'off'}")
        elif name == "/system":
            conversation.system = argument
            self._note("the model is told this from now on" if argument else "no system message")
        elif name == "/clear":
            conversation.turns.clear()
            self._note("a new conversation")
        elif name == "/save":
            self._save(argument)
        else:
            self._note(HELP if name == "/help" else f"{name}: unknown\n{HELP}")

    def _save(self, path: str) -> None:
        if not path:
            self._note("/save FILE: the name of the file is missing", "red")
            return
        text = json.dumps(self._conversation.messages(), ensure_ascii=False, indent=2)
        try:
            Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        except (OSError, RuntimeError, ValueError) as error:  # "~nobody/x", a null byte
            self._note(f"{path}: {getattr(error, 'strerror', None) or error}", "red")
        else:
            self._note(f"wrote {path}")

    async def _answer(self, text: str) -> None:
        speed = Speed()
        task = asyncio.ensure_future(self._show(text, speed))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            self._console.print()
            self._note(f"stopped: {speed}")
        except (ValueError, GenerationError, QueueFullError) as error:
            self._note(f"error: {error}", "red")
        else:
            self._note(str(speed))
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _show(self, text: str, speed: Speed) -> None:
        before = None
        async for part in self._conversation.answer(text, speed):
            if before is Reasoning and isinstance(part, Content):
                self._console.print("\n")
            before = type(part)
            shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", part.text)
            style = "dim italic" if before is Reasoning else None
            self._console.print(
                shown, end="", style=style, markup=False, highlight=False, soft_wrap=True
            )
        self._console.print()


def _reader() -> Callable[[], Awaitable[str]]:
    """Of a person at a terminal, with an editor; else of the lines of the standard input."""
    if sys.stdin is None or not sys.stdin.isatty():
        source = sys.stdin or io.StringIO()
        if isinstance(source, io.TextIOWrapper):
            source.reconfigure(errors="replace")

        async def read_line() -> str:
            line = await asyncio.to_thread(source.readline)
            if not line:
                raise EOFError
            return line

        return read_line

    keys = KeyBindings()

    @keys.add("enter")
    def _(event) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event) -> None:
        event.current_buffer.insert_text("\n")

    session = PromptSession(multiline=True, key_bindings=keys, prompt_continuation="  ")
    return lambda: session.prompt_async("> ")


async def terminal_chat(open_model: Callable[[], Awaitable[ServedModel]]) -> None:
    """Chats with a model until the input ends.

    Raises:
        ValueError: the program has no chat template.
    """
    model = await open_model()
    try:
        if model.template is None:
            raise ValueError(
                f"{model.name}: no chat template: copy chat_template.jinja, or a "
                "tokenizer_config.json that has one, from the checkpoint into this folder; "
                "`et-moe serve` answers /v1/completions without one"
            )
        await TerminalChat(model, Console(), _reader()).run()
    finally:
        model.guides.close()
        await model.engine.close()
