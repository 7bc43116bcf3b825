"""Searches for tags in text that arrives in pieces, where a piece may end inside of one."""

from collections.abc import Iterable


def first_tag(text: str, tags: Iterable[str]) -> tuple[int, str] | None:
    """Position and name of the first of `tags` in `text`; None if it has none."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=None)


def held_back(text: str, tags: Iterable[str]) -> int:
    """How many of the last characters may be the beginning of one of `tags`."""
    longest = 0
    for tag in tags:
        for size in range(min(len(tag) - 1, len(text)), longest, -1):
            if text.endswith(tag[:size]):
                longest = size
                break
    return longest
