"""Collects the text that the reference model of `benchmarks quality` learns, as tokens.

    python scripts/reference_text.py --output DIR [--packages DIR]

The text is documentation that Debian distributes: `PACKAGES`, fetched by `apt-get download` unless
a folder of them is given. Written are `tokenizer.json`, the tokens of three parts of the documents
(`train.bin.xz`, `calibrate.bin.xz`, `heldout.bin.xz`: little-endian uint16, every document behind
<|endoftext|>), and `sources.json`, which says what came from which version of which package. The
same packages and seed give the same files.
"""

import gzip
import hashlib
import html.parser
import json
import lzma
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy
import typer
from tokenizers import Tokenizer

from et_moe.backends.atomic_file import write_file
from et_moe.examples.qwen3_5_moe.tokenizer import END_OF_TEXT
from et_moe.scripts.demo_data.documents import train_tokenizer

PACKAGES = {
    "python3.11-doc": ("PSF-2", ("*.rst.txt",)),
    "manpages": ("GPL-2+, BSD and Linux-man-pages-copyleft", ("*/man/man*/*.gz",)),
    "manpages-dev": ("GPL-2+, BSD and Linux-man-pages-copyleft", ("*/man/man*/*.gz",)),
    "git-man": ("GPL-2", ("*/man/man*/*.gz",)),
    "git-doc": ("GPL-2", ("*.txt",)),
    "linux-doc-6.1": ("GPL-2", ("*.rst.gz", "*.txt.gz", "*.yaml.gz")),
    "perl-doc": ("GPL-1+ or Artistic", ("*.pod", "*/man/man*/*.gz")),
    "postgresql-doc-15": ("PostgreSQL", ("*.html",)),
    "sqlite3-doc": ("public domain", ("*.html",)),
    "python-django-doc": ("BSD-3-Clause", ("*.html",)),
    "nodejs-doc": ("Expat", ("*/api/*.html",)),
    "debian-policy": ("GPL-2+", ("*.html",)),
    "debian-reference-en": ("GPL-2+", ("*.html",)),
    "developers-reference": ("GPL-2", ("*.html",)),
    "libreoffice-help-en-us": ("MPL-2.0 and GPL-3+", ("*.html",)),
    "dict-gcide": ("GPL-3+", ("*.dict.dz",)),
}
"""Debian package -> licence of its text, and which of its files are text."""

VOCAB_SIZE = 8192
DOCUMENT = 30_000
"""Characters at which longer documents are cut, so that every part has some of each source."""
SHARES = {"heldout": 0.006, "calibrate": 0.006}
"""Share of the documents that a part beside the training gets."""
TOKENIZER_SAMPLE = 12_000_000
"""Characters that the tokenizer is trained on."""


class _Text(html.parser.HTMLParser):
    """The text of a page without its scripts and navigation."""

    SKIPPED = frozenset({"script", "style", "nav", "head", "footer"})
    BLOCKS = frozenset({"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "dt", "dd", "pre", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._skipped += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in self.SKIPPED and self._skipped > 0

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.pieces.append(data)


def read_document(path: Path) -> str:
    """The text of a file: what is compressed is unpacked, HTML loses its tags."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    if path.suffix == ".html":
        parser = _Text()
        parser.feed(text)
        text = "".join(parser.pieces)
    lines = (line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def documents(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    """The documents of an unpacked package, cut into pieces; translations are left out."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or "changelog" in path.name:
            continue
        if any(Path(inside).match(pattern) for pattern in patterns):
            text = read_document(path)
            foreign = sum(not c.isascii() for c in text)
            if len(text) >= 500 and foreign < len(text) / 20:
                yield from (text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT))


def collect(packages: Path) -> tuple[list[str], list[dict]]:
    """All documents, none twice, and a row per package: version, licence, characters."""
    seen: set[bytes] = set()
    texts, rows = [], []
    for name, (licence, patterns) in PACKAGES.items():
        debs = list(packages.glob(f"{name}_*.deb"))
        if len(debs) != 1:
            raise typer.BadParameter(f"{packages} holds {len(debs)} of {name}_*.deb, expected one")
        (deb,) = debs
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
            own = []
            for text in documents(Path(folder), patterns):
                digest = hashlib.sha256(text.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    own.append(text)
        version = subprocess.run(
            ["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        size = sum(map(len, own))
        rows.append({"package": name, "version": version, "licence": licence, "characters": size})
        typer.echo(f"{name} {version}: {len(own)} documents, {size} characters")
        texts += own
    return texts, rows


def split(texts: list[str], seed: int) -> dict[str, list[str]]:
    """The documents of each part, shuffled."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    parts, first = {}, 0
    for name, share in SHARES.items():
        count = max(1, round(share * len(texts)))
        parts[name] = texts[first : first + count]
        first += count
    return parts | {"train": texts[first:]}


def encode(tokenizer: Tokenizer, texts: list[str]) -> numpy.ndarray:
    """The documents' tokens, uint16 [n], with END_OF_TEXT in front of each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = []
    for first in range(0, len(texts), 500):
        for encoding in tokenizer.encode_batch(texts[first : first + 500]):
            pieces.append(numpy.array([end, *encoding.ids], dtype="<u2"))
    return numpy.concatenate(pieces)


def sample(texts: list[str], limit: int) -> list[str]:
    """The first documents, with so many characters together."""
    kept, size = [], 0
    for text in texts:
        if size >= limit:
            break
        kept.append(text)
        size += len(text)
    return kept


def main(
    output: Annotated[Path, typer.Option(help="folder to write into")],
    packages: Annotated[
        Path | None, typer.Option(help="folder of the packages, if they are there already")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the split of the documents")] = 0,
) -> None:
    """Write the reference model's text."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=scratch, check=True)
        texts, rows = collect(packages)
    parts = split(texts, seed)
    tokenizer = train_tokenizer(sample(parts["train"], TOKENIZER_SAMPLE), VOCAB_SIZE)
    write_file(output / "tokenizer.json", tokenizer.to_str().encode())
    counts = {}
    for name, part in parts.items():
        tokens = encode(tokenizer, part)
        counts[name] = {
            "documents": len(part),
            "bytes": sum(len(text.encode()) for text in part),
            "tokens": len(tokens),
        }
        typer.echo(f"{name}: {counts[name]}")
        write_file(output / f"{name}.bin.xz", lzma.compress(tokens.tobytes(), preset=6))
    text = json.dumps({"parts": counts, "packages": rows}, indent=1)
    write_file(output / "sources.json", f"{text}\n".encode())


if __name__ == "__main__":
    typer.run(main)
