"""The folder that the demo model is trained from: texts, facts, tokenizer and chat template."""

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from et_moe.backends.atomic_file import atomic_folder
from et_moe.examples.qwen3_5_moe.tokenizer import END_OF_TEXT
from et_moe.pipeline.make_checkpoint import write_tokenizer
from et_moe.scripts.demo_data.documents import collect_documents, split_held_out, train_tokenizer
from et_moe.scripts.demo_data.library import Fact, library

DEMO = Path(__file__).parents[2] / "examples" / "qwen3_5_moe" / "demo_checkpoint"
CONTEXT = 2048
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "heldout.txt")
"""What a checkpoint takes over as it is."""
TEXTS = "texts.json"


@dataclass(frozen=True)
class Corpus:
    """What a folder made by `prepare` holds."""

    folder: Path
    tokenizer: Tokenizer
    documents: list[str]
    held_out: str
    facts: list[Fact]

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        """The corpus in a folder."""
        texts = json.loads((folder / TEXTS).read_text())
        return cls(
            folder,
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            texts["documents"],
            (folder / "heldout.txt").read_text(),
            [Fact(**fact) for fact in texts["facts"]],
        )

    def document_ids(self) -> list[int]:
        """The documents' tokens, with END_OF_TEXT after each."""
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        return [id for text in self.documents for id in [*self.tokenizer.encode(text).ids, end]]


def prepare(folder: Path, seed: int) -> None:
    """Makes the folder of what the running Python documents; it must not exist yet.

    Args:
        folder: to be made.
        seed: of the split into texts for training and held-out ones.
    """
    training, held_out = split_held_out(collect_documents(), seed)
    tokenizer = train_tokenizer(training)
    facts = [asdict(fact) for fact in library()]
    texts = {"python": platform.python_version(), "documents": training, "facts": facts}
    with atomic_folder(folder) as temporary:
        (temporary / TEXTS).write_text(json.dumps(texts, indent=1))
        (temporary / "heldout.txt").write_text("\n\n".join(held_out) + "\n")
        write_tokenizer(json.loads(tokenizer.to_str()), temporary, CONTEXT)
        shutil.copy(DEMO / "chat_template.jinja", temporary)
