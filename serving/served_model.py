"""A program folder, loaded: all that requests for it need."""

import os
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from et_moe.serving.chat_template import ChatTemplate, read_chat_template, read_special_tokens
from et_moe.serving.engine import AsyncEngine, load_engine, load_tokenizer
from et_moe.serving.generation import Generation
from et_moe.serving.generation_config import read_sampling_defaults
from et_moe.serving.guidance import Guide, Guides
from et_moe.serving.interface import SamplingParams
from et_moe.serving.metrics import Metrics


class Tokenizer(Protocol):
    """Text to token ids and back; the extension's has it."""

    vocab_size: int

    def encode(self, text: str, parse_special: bool = True) -> list[int]: ...
    def id_to_bytes(self, id: int) -> bytes: ...
    def is_special(self, id: int) -> bool: ...


@dataclass
class ServedModel:
    """One model that requests are for.

    Args:
        name: that clients ask for.
        template: None if the program has no chat template, and cannot chat.
        special_tokens: `eos_token` and the like, by name.
        defaults: sampling parameters for requests that do not give them.
    """

    name: str
    engine: AsyncEngine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    special_tokens: Mapping[str, str]
    defaults: Mapping[str, Any]
    metrics: Metrics
    guides: Guides
    _running: weakref.WeakSet[Generation] = field(default_factory=weakref.WeakSet)
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def make(
        cls, name: str, engine: AsyncEngine, tokenizer: Tokenizer, program_dir: Path
    ) -> "ServedModel":
        """The model of a folder whose engine and tokenizer are loaded.

        Raises:
            ValueError: a file of the folder does not hold what it should; names file and key.
        """
        native = engine.engine
        return cls(
            name,
            engine,
            tokenizer,
            read_chat_template(program_dir),
            read_special_tokens(program_dir),
            read_sampling_defaults(program_dir),
            Metrics(native.status),
            Guides(tokenizer, native.info),
        )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        guides: Sequence[Guide] | None = None,
    ) -> list[Generation]:
        """Submits all or none; raises like `Engine.submit`."""
        generations: list[Generation] = []
        try:
            for i, (prompt, its_params) in enumerate(zip(prompts, params, strict=True)):
                guide = guides[i] if guides else None
                generations.append(
                    Generation(self.engine, self.tokenizer, prompt, its_params, guide, self.metrics)
                )
        except BaseException:
            for generation in generations:
                generation.close()
            raise
        self._running.update(generations)
        return generations

    def cancel_all(self) -> None:
        """Ends all that runs, which those who wait for it are told."""
        for generation in list(self._running):
            generation.cancel()

    def token_text(self, token_id: int) -> str:
        """A token for people: its text, or its bytes where they are no text of their own."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def token_bytes(self, token_id: int) -> bytes:
        """Empty for ids that the model has and the tokenizer has not."""
        return self.tokenizer.id_to_bytes(token_id) if token_id < self.tokenizer.vocab_size else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


OpenModel = Callable[[], Awaitable[ServedModel]]
"""Makes the model on the running event loop."""


def model_opener(program: Path, name: str | None, **engine_options) -> OpenModel:
    """A program's files are read now, so that what is wrong with them is said at once.

    Args:
        name: that clients ask for; None for the folder's.
        engine_options: as `load_engine` takes them.

    Raises:
        ValueError: a file is missing or does not fit, or there is too little memory.
    """
    try:
        tokenizer = load_tokenizer(program)
        for read in (read_chat_template, read_special_tokens, read_sampling_defaults):
            read(program)  # a model of many gigabytes is not loaded for a template that is none
        engine = load_engine(program, **engine_options)
    except RuntimeError as error:
        raise ValueError(str(error)) from None

    async def open_model() -> ServedModel:
        folder = os.fsencode(program.resolve().name).decode(errors="replace")
        return ServedModel.make(name or folder, AsyncEngine(engine), tokenizer, program)

    return open_model
