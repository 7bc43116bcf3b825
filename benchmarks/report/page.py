"""Makes docs/results.md of the results in benchmarks/results."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from et_moe.backends.atomic_file import write_file
from et_moe.benchmarks.report import (
    acceptance,
    activations,
    batch,
    cpu,
    e2e,
    kernels,
    machine_code,
    overhead,
    peers,
    quality,
)
from et_moe.benchmarks.report.markdown import commit_of
from et_moe.benchmarks.result import REPO, rounded, write_result

RESULTS = REPO / "benchmarks/results"
PAGE = REPO / "docs/results.md"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: of the JSON file.
        title: what its figures are called.
        render: Markdown of a condensed result; the last section takes None, too.
        condense: what is kept of a command's result.
        plot: draws a condensed result into a file.
    """

    name: str
    title: str
    render: Callable[[dict], list[str]]
    condense: Callable[[dict], dict] = dict
    plot: Callable[[dict, Path], None] | None = None


SECTIONS = (
    Section("e2e", "end to end", e2e.section, e2e.condense, e2e.plot),
    Section("batch", "many sequences", batch.section, plot=batch.plot),
    Section("overhead", "server", overhead.section),
    Section("peers", "other implementations", peers.section),
    Section("kernels", "kernels", kernels.section, kernels.condense, kernels.plot),
    Section("quality", "quality", quality.section, quality.condense),
    Section("activations", "activations", activations.section),
    Section("acceptance", "acceptance", acceptance.section, acceptance.condense),
    Section("static", "machine code", machine_code.section, machine_code.condense),
    Section("e2e_cpu", "on a CPU", cpu.section, e2e.condense),
)

HEAD = """# Results

Qwen3.5-35B-A3B at full size with random weights, INT4 weights, batch 1, greedy, unless it says
otherwise. This page is made by `python -m et_moe.benchmarks report` of the files in
`benchmarks/results`; what bounds these figures, and what was tried, is in
[performance.md](performance.md).

`FOLDER` is made on any machine by `scripts/pack_acceptance.sh FOLDER` and
`scripts/pack_full_size.sh FOLDER`; then, on a machine with a GPU:

    scripts/gpu_acceptance.sh FOLDER
    scripts/gpu_full_size.sh FOLDER

and, where `FOLDER/results` has come back to:

    python -m et_moe.benchmarks static --write FOLDER/results/static.json
    python -m et_moe.benchmarks report FOLDER/results"""


def condense(section: Section, path: Path) -> dict:
    """What is kept of a result file, rounded, with the folder above its own called FOLDER.

    Seconds and commands, separated by a tab, of lines in a file beside it with the ending .tsv
    become `steps`: how the programs were made.
    """
    result = section.condense(json.loads(path.read_text()))
    steps = path.with_suffix(".tsv")
    if steps.is_file():
        lines = (line.partition("\t") for line in steps.read_text().splitlines())
        result["steps"] = [{"command": text, "seconds": int(n)} for n, _, text in lines]
    text = json.dumps(rounded(result))
    return json.loads(text.replace(str(path.resolve().parent.parent), "FOLDER"))


def _commits(results: dict[str, dict]) -> str:
    """Of which commit the figures are, in a sentence."""
    by_commit: dict[str, list[str]] = {}
    for section in SECTIONS:
        if section.name in results:
            by_commit.setdefault(commit_of(results[section.name]), []).append(section.title)
    if len(by_commit) == 1:
        return f"All figures are of commit {next(iter(by_commit))}."
    parts = (f"{name} ({', '.join(titles)})" for name, titles in by_commit.items())
    return f"The figures are of several commits: {', '.join(parts)}."


def page(results: dict[str, dict]) -> str:
    """The page's text.

    Args:
        results: condensed results by the name of their section; those that are missing are left
            out.
    """
    lines = [HEAD, "", _commits(results)]
    for section in SECTIONS:
        result = results.get(section.name)
        if result is not None or section.name == "e2e_cpu":
            lines += ["", *section.render(result)]
    return "\n".join(lines) + "\n"


def read_results(folder: Path) -> dict[str, dict]:
    """The condensed results in a folder, by name."""
    paths = {section.name: folder / f"{section.name}.json" for section in SECTIONS}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.is_file()}


def update(new: Path | None) -> None:
    """Takes over results from a folder, if one is given, and writes the page and its plots.

    Raises:
        ValueError: the folder holds no result.
    """
    if new is not None:
        found = [s for s in SECTIONS if (new / f"{s.name}.json").is_file()]
        if not found:
            names = ", ".join(f"{section.name}.json" for section in SECTIONS)
            raise ValueError(f"{new}: no results found, expected {names}")
        for section in found:
            write_result(
                RESULTS / f"{section.name}.json", condense(section, new / f"{section.name}.json")
            )
    results = read_results(RESULTS)
    for section in SECTIONS:
        if section.plot and section.name in results:
            section.plot(results[section.name], PAGE.parent / f"images/{section.name}.png")
    write_file(PAGE, page(results).encode())
