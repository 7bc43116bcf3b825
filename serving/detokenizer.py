"""Token ids as text, while they come."""

import codecs
from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """What is needed of a tokenizer here; the extension's has it."""

    vocab_size: int

    def id_to_bytes(self, id: int) -> bytes: ...
    def is_special(self, id: int) -> bool: ...


class Detokenizer:
    """The text of a stream of token ids: whole characters only, so a character whose bytes are
    spread over several tokens comes with the last of them. Bytes that are no UTF-8 become U+FFFD.

    Args:
        skip_special_tokens: special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that is sure with these tokens."""
        return "".join(self._decoder.decode(self._bytes(token_id)) for token_id in token_ids)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off, or nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        # A model's vocabulary may have more rows than the tokenizer has tokens.
        if token_id >= self._tokenizer.vocab_size:
            return b""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.id_to_bytes(token_id)
