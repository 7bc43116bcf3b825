"""How many of the MTP head's drafts are accepted: the model's tokens, and steps that guess them.

A step begins with a token that was drawn. The head drafts k more, of which those are accepted that
the model draws, up to the first other one; the model's own token behind them is the next step's.
Steps are the engine's: the first token behind a prompt has no drafts yet, and near the end of a
sequence a step has fewer, so that none is drawn beyond it. A draft is drawn as the model draws,
from the head's logits and with the same noise.
Drafts change no token, so the tokens are drawn first, and the steps are walked through afterwards.
The head's KV cache is kept as `mtp.py` says. Everything is computed by the ops' eager references:
in fp32 for a checkpoint, with its storages and INT8 activations for a bundle.

Implementations differ in which states the head is given, those in front of a norm or those behind
it: the model's for the first draft, and the head's own for the further ones. All four ways are
counted; a head accepts more in the way that it was trained for.
"""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from et_moe.backends.method_graph import PAGES, SLOTS
from et_moe.backends.ops import PAGE_SIZE, rms_norm, sample
from et_moe.benchmarks.result import provenance, write_result
from et_moe.examples.qwen3_5_moe.graph import Places, State
from et_moe.examples.qwen3_5_moe.mtp import Qwen3_5MoeMtp
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError, read_json
from et_moe.pipeline.models import model_of
from et_moe.pipeline.quantize import QuantizedCheckpoint, meta_graph
from et_moe.pipeline.storage import Precision, choose_storages

MOST_DRAFTS = 3
BEHIND, IN_FRONT = "behind the norm", "in front of it"


@dataclass(frozen=True)
class Sizes:
    """How many prompts, and how many tokens each of them and what follows it has."""

    sequences: int
    prompt: int
    new_tokens: int


@dataclass(frozen=True)
class Hidden:
    """Which states the head is given: the model's, and its own of the draft before."""

    model: str = BEHIND
    head: str = BEHIND


def load_model(directory: Path) -> Qwen3_5MoeMtp:
    """A model with its head, to be run eagerly; a ConfigError if it has none."""
    if "et_moe" in read_json(directory / "config.json"):
        source = Bundle(directory)
    else:
        checkpoint = Checkpoint(directory)
        parts = model_of(checkpoint.config).parts
        source = QuantizedCheckpoint(checkpoint, choose_storages(parts, "none", 128, "none"))
    model = meta_graph(source.config, Precision(source.storages, dtype=torch.float32))
    if not isinstance(model, Qwen3_5MoeMtp):
        raise ConfigError(f"{directory}: no head for multi-token prediction (mtp.*) is there")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    tensors = {n: t.to(dtypes[n]) for group in source.groups() for n, t in group.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def prompts_of(text: Path, tokenizer: Path, sizes: Sizes) -> Tensor:
    """Pieces of a text, evenly spaced, `int64 [sequences, prompt]`."""
    ids = Tokenizer.from_file(str(tokenizer)).encode(text.read_text(encoding="utf-8")).ids
    if len(ids) < sizes.sequences * sizes.prompt:
        wanted = f"{sizes.sequences} prompts of {sizes.prompt} tokens"
        raise ValueError(f"{text}: {len(ids)} tokens, too few for {wanted}")
    step = len(ids) // sizes.sequences
    starts = range(0, sizes.sequences * step, step)
    return torch.tensor([ids[start : start + sizes.prompt] for start in starts])


class Sequences:
    """Sequences that the model has continued.

    Args:
        prompts: `int64 [B, P]`.
        temperature, seed: of all draws.
        drawn: `int64 [B, new_tokens]`, where it is known what they are continued by.

    Attributes:
        tokens: `int64 [B, T]`, prompts and what was drawn.
        hidden: `[B, T - 1, H]`, the model's states in front of its final norm.
    """

    def __init__(
        self,
        model: Qwen3_5MoeMtp,
        prompts: Tensor,
        new_tokens: int,
        temperature: float,
        seed: int,
        drawn: Tensor | None = None,
    ) -> None:
        self.model, (count, self.prompt) = model, prompts.shape
        pages = -(-(self.prompt + new_tokens + MOST_DRAFTS) // PAGE_SIZE)
        self._slots = torch.arange(count, dtype=torch.int32)
        self._pages = torch.arange(count * pages, dtype=torch.int32).view(count, pages)
        state, piece = self.make_state(), prompts
        tokens, hidden = [prompts], []
        same = (torch.full((count,), temperature), torch.zeros(count, dtype=torch.int64))
        self._drawing = (*same, torch.ones(count), torch.full((count,), seed))
        positions = itertools.chain((0,), range(self.prompt, self.prompt + new_tokens - 1))
        for i, position in enumerate(positions):
            begins = torch.full((count,), position)
            x = model.hidden(piece, self.places(begins), state).view(count, piece.shape[1], -1)
            logits = model.lm_head(x[:, -1].float(), norm=model.norm.weight)
            piece = self.draw(logits, begins + piece.shape[1] - 1)
            if drawn is not None:
                piece = drawn[:, i : i + 1]
            hidden.append(x)
            tokens.append(piece)
        self.tokens, self.hidden = torch.cat(tokens, 1), torch.cat(hidden, 1)

    def draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The token `int64 [B, 1]` behind the one at a position of each sequence."""
        return sample(logits, *self._drawing, positions)

    def make_state(self) -> State:
        """State of zeros."""
        return self.model.make_state({PAGES: self._pages.numel(), SLOTS: len(self._slots)})

    def places(self, positions: Tensor, num_tokens: Tensor | None = None) -> Places:
        """Where rows of all sequences lie; see `Places`."""
        return Places(positions, self._slots, self._pages, num_tokens)


class Head:
    """The head with its KV cache, at work on sequences."""

    def __init__(self, sequences: Sequences, hidden: Hidden) -> None:
        self._model, self._hidden, self._draw = sequences.model, hidden, sequences.draw
        self._state = sequences.make_state()
        states = sequences.hidden
        self.states = states if hidden.model == IN_FRONT else self._model.normed(states)

    def draft(self, states: Tensor, tokens: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """One step of the head, see `Qwen3_5MoeMtp.draft`.

        Args:
            states: `[B, R, H]`. tokens: `int64 [B, R]`.

        Returns:
            The state that the next draft takes and the draft, of the last valid row of each
            sequence: `[B, H]` and `int64 [B]`.
        """
        model = self._model
        embedded = model.embed_tokens(tokens.reshape(-1))
        x = model.mtp(embedded, states.flatten(0, 1), places, self._state)
        rows = torch.arange(len(tokens)) * tokens.shape[1] + (places.num_tokens - 1).clamp(min=0)
        x = x[rows]
        normed = rms_norm(x, model.mtp.norm.weight, model.config.rms_norm_eps)
        # A row lies a position before the token that it takes.
        behind = places.positions + places.num_tokens.clamp(min=1)
        drafts = self._draw(model.lm_head(normed), behind)[:, 0]
        return x if self._hidden.head == IN_FRONT else normed, drafts


def count_accepted(sequences: Sequences, k: int, hidden: Hidden) -> list[int]:
    """How many steps with drafts there were, and of how many the first one was accepted, the first
    two, …."""
    head, tokens = Head(sequences, hidden), sequences.tokens
    each, last = torch.arange(len(tokens))[:, None], tokens.shape[1] - 1
    counts = torch.zeros(k + 1, dtype=torch.int64)
    # Rows that the cache has, and the place of the token that was drawn last.
    filled, drawn = torch.zeros_like(each[:, 0]), each[:, 0] * 0 + sequences.prompt + 1
    while (live := drawn + 2 <= last).any():
        rows = (drawn - filled) * live
        row = (filled[:, None] + torch.arange(int(rows.max()))).clamp(max=last - 1)
        places = sequences.places(filled, rows)
        state, draft = head.draft(head.states[each, row], tokens[each, row + 1], places)
        accepted, filled = live, drawn
        counts[0] += live.sum()
        for j in range(1, k + 1):
            if j > 1:
                places = sequences.places(drawn + j - 2, live.long())
                state, draft = head.draft(state[:, None], draft[:, None], places)
            place = (drawn + j).clamp(max=last)[:, None]
            accepted = accepted & (draft == tokens.gather(1, place)[:, 0]) & (drawn + j < last)
            counts[j] += accepted.sum()
            filled = filled + accepted
        filled, drawn = drawn, filled + live
    return counts.tolist()


def count(sequences: Sequences, ways: list[Hidden]) -> list[dict]:
    """A row for each way and number of drafts."""
    rows = []
    for hidden, k in itertools.product(ways, range(1, MOST_DRAFTS + 1)):
        steps, *accepted = count_accepted(sequences, k, hidden)
        row = {"model": hidden.model, "head": hidden.head, "k": k, "steps": steps}
        row["accepted"] = [number / steps for number in accepted]
        rows.append(row | {"tokens_per_step": 1 + sum(row["accepted"])})
    return rows


def measure(
    model_dir: Path, text: Path, sizes: Sizes, temperature: float, seed: int, out: Path
) -> None:
    """Continues prompts of a text and counts the drafts that are accepted; prints a table.

    Raises:
        ConfigError: the model has no head. ValueError: the text is too short for the prompts.
    """
    torch.set_num_threads(1)  # last bits depend on their number, and the references are all small
    prompts = prompts_of(text, model_dir / "tokenizer.json", sizes)
    model = load_model(model_dir)
    with torch.no_grad():
        sequences = Sequences(model, prompts, sizes.new_tokens, temperature, seed)
        ways = [Hidden(*pair) for pair in itertools.product((BEHIND, IN_FRONT), repeat=2)]
        rows = count(sequences, ways)
    head = {"sizes": asdict(sizes), "temperature": temperature, "seed": seed}
    write_result(out, provenance() | head | {"rows": rows})
    table = Table("model's state", "head's own", "k", "steps", "1st", "2nd", "3rd", "tokens a step")
    for row in rows:
        shares = [f"{share:.1%}" for share in row["accepted"]]
        shares += [""] * (MOST_DRAFTS - len(shares))
        cells = (row["model"], row["head"], str(row["k"]), str(row["steps"]), *shares)
        table.add_row(*cells, f"{row['tokens_per_step']:.2f}")
    Console(width=110).print(table)
