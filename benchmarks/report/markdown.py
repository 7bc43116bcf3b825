"""Pieces of Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A table; all but the first `text_columns` are numbers, set to the right."""
    line = ["---"] * text_columns + ["--:"] * (len(head) - text_columns)
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(line)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def commit_of(result: dict) -> str:
    """A result's commit, short, and whether the sources differed from it."""
    if not result.get("commit"):
        return "an unknown commit"
    return result["commit"][:7] + (", with changes" if result.get("modified") else "")


def source(result: dict) -> list[str]:
    """Where a result comes from: command, commit, machine and versions; ends with an empty line."""
    versions = [f"{k} {v}" for k, v in result.get("versions", {}).items() if v]
    driver = f", driver {result['driver']}" if result.get("driver") else ""
    machine = f"{result['machine']}{driver}, {result['cpus']} CPU cores"
    note = f" {result['note']}" if "note" in result else ""
    text = f"Commit {commit_of(result)}; {machine}; {', '.join(versions)}.{note}"
    return [f"`{result['command']}`", "", text, ""]


def number(value: float, digits: int = 0) -> str:
    """With commas between thousands."""
    return f"{value:,.{digits}f}"
