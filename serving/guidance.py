"""Guided decoding: masks of the tokens that a grammar allows next, by llguidance.

Grammars come from whoever sends a request. Compiling one and computing a mask are bounded in time
and memory, and run in threads of their own, so that neither the event loop nor the device's thread
waits for them.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from et_moe.serving.interface import ModelInfo

MAX_GRAMMAR_CHARACTERS = 128 * 1024
_COMPILE_SECONDS = 10.0
_LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=500_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or is too large."""


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer, info: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = info.eos_token_ids[0]
        ids = range(min(tokenizer.vocab_size, info.vocab_size))
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i)]
        special = {*self.special_token_ids, *info.eos_token_ids}
        self.tokens = [b"" if i in special else tokenizer.id_to_bytes(i) for i in ids]
        self.tokens += [b""] * (info.vocab_size - len(self.tokens))
        # llguidance wants a text for each special token, which no text of a grammar may meet.
        for i in special:
            self.tokens[i] = b"\xff<%d>" % i

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), False)


class Guide:
    """The state of one sequence under a grammar. One call at a time."""

    def __init__(self, matcher: LLMatcher, pool: ThreadPoolExecutor, size: int, eos) -> None:
        self._matcher, self._pool, self._size = matcher, pool, size
        self._end = bytearray(size)
        for i in eos:
            self._end[i // 8] |= 1 << i % 8

    async def start(self) -> bytes:
        """The mask of the first token, as `Engine.allow` takes it."""
        return await self._in_thread(())

    async def advance(self, token_ids: Sequence[int]) -> bytes:
        """The mask of the token after these, which have been drawn."""
        return await self._in_thread(token_ids)

    async def _in_thread(self, token_ids: Sequence[int]) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._mask, list(token_ids))

    def _mask(self, token_ids: list[int]) -> bytes:
        matcher = self._matcher
        if token_ids and not matcher.is_stopped():
            matcher.consume_tokens(token_ids)
        # Nothing may follow, or a limit was reached in mid-answer: the sequence ends.
        if matcher.is_stopped():
            return bytes(self._end)
        mask = matcher.compute_bitmask()[: self._size]
        if matcher.is_error() or not any(mask):
            return bytes(self._end)
        return mask.ljust(self._size, b"\0")


class Guides:
    """Makes the guides of one model.

    Args:
        tokenizer: with `vocab_size`, `encode`, `id_to_bytes` and `is_special`.
        info: of the model, whose vocabulary may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer, info: ModelInfo) -> None:
        self._tokenizer, self._info = tokenizer, info
        self._pool = ThreadPoolExecutor(2, "guidance")
        self._vocabulary: LLTokenizer | None = None

    async def compile(self, grammar: str, copies: int = 1) -> list[Guide]:
        """A guide for each of `copies` sequences.

        Args:
            grammar: in llguidance's variant of Lark.

        Raises:
            GrammarError: it cannot be compiled within the limits.
        """
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            size = f"{len(grammar)} characters, expected at most {MAX_GRAMMAR_CHARACTERS}"
            raise GrammarError(f"the grammar has {size}")
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._pool, self._compile, grammar, copies)
        try:
            return await asyncio.wait_for(work, _COMPILE_SECONDS)
        except TimeoutError:
            raise GrammarError(f"it takes longer than {_COMPILE_SECONDS:.0f} seconds") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str, copies: int) -> list[Guide]:
        if self._vocabulary is None:  # Takes a second for a large vocabulary.
            wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer, self._info))
            eos = list(self._info.eos_token_ids)
            self._vocabulary = LLTokenizer(wrapper, n_vocab=self._info.vocab_size, eos_token=eos)
        source = LLMatcher.grammar_from_lark(grammar)
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error().splitlines()[0])
        size = (self._info.vocab_size + 7) // 8
        matchers = [matcher, *(matcher.deep_copy() for _ in range(copies - 1))]
        return [Guide(m, self._pool, size, self._info.eos_token_ids) for m in matchers]
