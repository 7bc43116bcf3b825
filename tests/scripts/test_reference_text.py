"""The text of the reference model: what is taken of packages, and what is made of it."""

import gzip
import itertools
import json
import subprocess
from pathlib import Path

import pytest
import torch
import typer

from et_moe.benchmarks.reference.training import Text
from et_moe.examples.qwen3_5_moe.tokenizer import END_OF_TEXT
from et_moe.scripts import reference_text

PACKAGES = {"pages": ("BSD", ("*.html",)), "manuals": ("GPL", ("*/man/man*/*.gz",))}
LINES = "A line of a page that says something, number"


def make_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    root = folder / f"root-{name}"
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    fields = {"Package": name, "Version": "1.2-3", "Architecture": "all", "Maintainer": "x <x@x>"}
    fields["Description"] = "x"
    (root / "DEBIAN").mkdir()
    control = "".join(f"{key}: {value}\n" for key, value in fields.items())
    (root / "DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", root, folder / f"{name}_1.2-3_all.deb"], check=True)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of pages and manuals, one of them twice, one in another script, one too short."""
    monkeypatch.setattr(reference_text, "PACKAGES", PACKAGES)
    folder = tmp_path / "packages"
    folder.mkdir()
    bodies = [" ".join(f"{LINES} {i * 50 + j}." for j in range(20)) for i in range(12)]
    page = "<head><title>no</title></head><nav>no</nav><p>{}</p><script>no()</script>"
    pages = {f"usr/share/doc/{i}.html": page.format(b).encode() for i, b in enumerate(bodies)}
    pages["usr/share/doc/twice.html"] = page.format(bodies[0]).encode()
    pages["usr/share/doc/short.html"] = b"<p>short</p>"
    pages["usr/share/doc/other.html"] = ("<p>" + "\u4e2d" * 600).encode()
    make_package(folder, "pages", pages)
    manual = gzip.compress(("A manual of its own. " * 60).encode())
    make_package(folder, "manuals", {"usr/share/man/man1/a.1.gz": manual})
    return folder


def test_text_comes_back_from_its_tokens(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference_text.main(out, packages, 0)
    text = Text(out)
    found = []
    for part in ("heldout", "calibrate", "train"):
        tokens = text.tokens(part)
        assert text.sources["parts"][part]["tokens"] == len(tokens)
        end = text.tokenizer.token_to_id(END_OF_TEXT)
        assert tokens[0] == end
        starts = [*torch.nonzero(tokens == end).flatten().tolist(), len(tokens)]
        for begin, stop in itertools.pairwise(starts):
            found.append(text.tokenizer.decode(tokens[begin + 1 : stop].tolist()))
        assert text.sources["parts"][part]["documents"] == len(starts) - 1
    assert len(found) == len(set(found)) == 13  # a page that is there twice counts once
    assert sum(document.startswith(LINES) for document in found) == 12
    assert not any("no" in document.split() for document in found)
    rows = text.sources["packages"]
    assert [row["package"] for row in rows] == ["pages", "manuals"]
    assert rows[0]["version"] == "1.2-3" and rows[1]["licence"] == "GPL"
    again = tmp_path / "again"
    reference_text.main(again, packages, 0)
    assert (again / "train.bin.xz").read_bytes() == (out / "train.bin.xz").read_bytes()
    assert json.loads((again / "sources.json").read_text()) == text.sources


def test_long_documents_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 70_000)
    pieces = list(reference_text.documents(tmp_path, ("*.txt",)))
    assert [len(piece) for piece in pieces] == [30_000, 30_000, 10_000]


def test_a_package_that_is_not_there_is_named(packages: Path, tmp_path: Path) -> None:
    (packages / "manuals_1.2-3_all.deb").unlink()
    with pytest.raises(typer.BadParameter, match=r"holds 0 of manuals_\*\.deb, expected one"):
        reference_text.main(tmp_path / "out", packages, 0)
    assert not list((tmp_path / "out").iterdir())
