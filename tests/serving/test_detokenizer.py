"""Token ids become text while they come."""

import pytest

from et_moe.serving.detokenizer import Detokenizer


class Bytes:
    """A tokenizer whose tokens are the bytes, followed by a special token."""

    vocab_size = 257

    def id_to_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b"<|end|>"

    def is_special(self, id: int) -> bool:
        return id == 256


@pytest.mark.parametrize("text", ["plain", "süß 漢字 🙂🙂", "a\u0301\u200d", ""])
def test_characters_come_whole(text: str) -> None:
    detokenizer, came = Detokenizer(Bytes()), ""
    for byte in text.encode():
        came += detokenizer.feed([byte])
        assert text.startswith(came)
    assert came == text and detokenizer.finish() == ""


def test_bytes_that_are_no_utf8() -> None:
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.feed([0xFF, 0x41, 0xE6]) == "\ufffdA"
    assert detokenizer.feed([0x42]) == "\ufffdB"
    assert detokenizer.feed([0xE6, 0xBC]) == "" and detokenizer.finish() == "\ufffd"


def test_special_tokens() -> None:
    assert Detokenizer(Bytes()).feed([0x41, 256, 0x42]) == "AB"
    assert Detokenizer(Bytes(), skip_special_tokens=False).feed([0x41, 256]) == "A<|end|>"


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert Detokenizer(Bytes()).feed([0x41, 257, 9999, 0x42]) == "AB"
