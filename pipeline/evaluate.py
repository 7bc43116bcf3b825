"""How good an exported model is on a text, and how far from a reference: perplexity, KL divergence,
top-1."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from et_moe.pipeline.config import ConfigError, read_text
from et_moe.pipeline.logits import LOCAL, HuggingFaceLogits, Logits, ProgramLogits, Windows
from et_moe.pipeline.models import load_config
from et_moe.pipeline.tokenizer import check_tokenizer

TOKENIZER = "tokenizer.json"
ROWS = 64
"""Rows of logits that are compared at once."""


@dataclass(frozen=True)
class HalfWindows:
    """Perplexity as llama.cpp's `llama-perplexity` has it, so that figures can be compared.

    A text is cut into windows of n tokens; what is left behind the last full one is dropped. In
    each the tokens behind the one with index n // 2 count, n - 1 - n // 2 of them, so that each has
    at least half a window before it. The tool refuses a text of fewer than two windows, and its
    windows have 512 tokens unless `-c` says otherwise. Source: the function `perplexity` in
    `tools/perplexity/perplexity.cpp` of llama.cpp (`examples/perplexity` in older versions). For a
    tokenizer that begins texts with a token of its own it also replaces the first token of every
    window by that one; Qwen's have none. It reads special tokens that a text spells out
    (`<|im_end|>`) as any other text, where here they are one token.

    Attributes:
        tokens: how many count.
        perplexity: exp of their mean negative log-likelihood.
        error: the tool's "+/-", the perplexity times the standard error of that mean.
    """

    tokens: int
    perplexity: float
    error: float


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens; what compares with a reference is None without one.

    Attributes:
        tokens: how many were predicted.
        perplexity: of the exported model.
        reference_perplexity: of the reference: a Hugging Face model (in the checkpoint's dtype), or
            another program.
        kl_divergence: of the exported model's distribution from the reference's, in nats.
        top1_agreement: share of positions where both have the same likeliest token.
        llama_cpp, reference_llama_cpp: of both models, or None if the text has fewer than two full
            windows, or these have no token that counts.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    llama_cpp: HalfWindows | None = None
    reference_llama_cpp: HalfWindows | None = None

    @property
    def perplexity_growth(self) -> float | None:
        """perplexity / reference_perplexity - 1."""
        if self.reference_perplexity is None:
            return None
        return self.perplexity / self.reference_perplexity - 1

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"perplexity_growth": self.perplexity_growth})

    def to_table(self) -> str:
        rows = [("Predicted tokens", f"{self.tokens}")]
        growth = ""
        if self.reference_perplexity is not None:
            rows.append(("Perplexity, reference", f"{self.reference_perplexity:.4f}"))
            growth = f" ({self.perplexity_growth:+.2%})"
        rows.append(("Perplexity, exported", f"{self.perplexity:.4f}{growth}"))
        pairs = (("reference", self.reference_llama_cpp), ("exported", self.llama_cpp))
        for name, found in pairs:
            if found is not None:
                value = f"{found.perplexity:.4f} +/- {found.error:.5f}"
                rows.append((f"As llama.cpp, {name}", value))
        if self.kl_divergence is not None:
            rows.append(("KL divergence", f"{self.kl_divergence:.5f} nats"))
            rows.append(("Top-1 agreement", f"{self.top1_agreement:.2%}"))
        return "\n".join(f"  {name:<23} {value}" for name, value in rows)


class _Likelihood:
    """Sums of one model's negative log-likelihoods: of all tokens, and of those in the second
    halves of full windows."""

    def __init__(self) -> None:
        self._count = self._half_count = 0
        self._sum = self._half_sum = self._half_squares = 0.0

    def add(self, nll: Tensor, in_half: Tensor) -> None:
        """Args: nll: float64 `[R]`. in_half: bool `[R]`, which are in such a half."""
        half = nll[in_half]
        self._count += len(nll)
        self._sum += nll.sum().item()
        self._half_count += len(half)
        self._half_sum += half.sum().item()
        self._half_squares += half.square().sum().item()

    def perplexity(self) -> float:
        return math.exp(self._sum / self._count)

    def half_windows(self) -> HalfWindows:
        count = self._half_count
        mean = self._half_sum / count
        variance = max(0.0, self._half_squares / count - mean * mean)
        perplexity = math.exp(mean)
        return HalfWindows(count, perplexity, perplexity * math.sqrt(variance / max(1, count - 1)))


class _Comparison:
    """Reads the rows of both models, and what follows from them."""

    def __init__(self, exported: Logits, reference: Logits | None) -> None:
        self._exported, self._reference = exported, reference
        self._ours, self._theirs = _Likelihood(), _Likelihood()
        self._count = self._agree = 0
        self._kl = 0.0

    def add(self, targets: Tensor, in_half: Tensor) -> None:
        """Takes the next rows: those that predict `targets`, int64 `[R]`."""

        def read(logits: Logits, likelihood: _Likelihood) -> Tensor:
            rows = logits.read(len(targets)).double().log_softmax(-1)
            likelihood.add(-rows.gather(1, targets[:, None])[:, 0], in_half)
            return rows

        exported = read(self._exported, self._ours)
        self._count += len(targets)
        if self._reference is None:
            return
        reference = read(self._reference, self._theirs)
        self._kl += (reference.exp() * (reference - exported)).sum().item()
        self._agree += int((reference.argmax(-1) == exported.argmax(-1)).sum())

    def result(self, has_halves: bool) -> Evaluation:
        count = self._count
        ours = self._ours.half_windows() if has_halves else None
        if self._reference is None:
            return Evaluation(count, self._ours.perplexity(), llama_cpp=ours)
        theirs = self._theirs.half_windows() if has_halves else None
        agreement = self._agree / count
        perplexities = self._ours.perplexity(), self._theirs.perplexity()
        return Evaluation(count, *perplexities, self._kl / count, agreement, ours, theirs)


def _encode(folder: Path, content: str) -> list[int]:
    """A text's token ids, by the `tokenizer.json` of a program or a checkpoint, or by what
    transformers makes of a checkpoint's other files where there is none."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if path.is_file():
        check_tokenizer(folder)
        return Tokenizer.from_file(str(path)).encode(content).ids
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    # Not verbose: that a text is longer than the model's context does not matter here.
    return tokenizer(content, verbose=False)["input_ids"]


def _encode_alike(content: str, text: Path, folder: Path, other: Path | None) -> list[int]:
    """The token ids of the content of `text`.

    Raises:
        ConfigError: they are others by the `tokenizer.json` of `other`, if there is one.
    """
    ids = _encode(folder, content)
    theirs = other / TOKENIZER if other is not None else None
    if theirs is not None and theirs.is_file() and _encode(other, content) != ids:
        path = folder / TOKENIZER
        ours = path if path.is_file() else folder
        raise ConfigError(f"{theirs}: {text} has other tokens by it than by {ours}")
    return ids


def _read_windows(
    text: Path,
    program_dir: Path,
    model_dir: Path | None,
    reference_program: Path | None,
    window: int,
) -> list[list[int]]:
    """The text's token ids in windows, of which the last may be shorter, and has at least two."""
    if window < 2:
        raise ConfigError(f"--window {window}: expected at least 2 tokens")
    content = read_text(text)
    if model_dir is not None:
        load_config(model_dir)  # names what is missing, before transformers would ask a hub for it
        ids = _encode_alike(content, text, model_dir, program_dir)
    else:
        path = program_dir / TOKENIZER
        if not (program_dir / "model.pte").is_file():
            raise ConfigError(f"{program_dir}: no program: model.pte is not there")
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; --model-dir names a checkpoint with one")
        ids = _encode_alike(content, text, program_dir, reference_program)
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ConfigError(f"{text}: holds fewer than two tokens")
    return windows


def _open_reference(
    stack: contextlib.ExitStack,
    windows: Windows,
    runner: Path,
    model_dir: Path | None,
    reference_program: Path | None,
) -> Logits | None:
    if reference_program is not None:
        return stack.enter_context(ProgramLogits(runner, reference_program, windows))
    return None if model_dir is None else HuggingFaceLogits(model_dir, windows)


def evaluate(
    program_dir: Path,
    text: Path,
    runner: Path,
    window: int,
    model_dir: Path | None = None,
    reference_program: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Scores `text` in windows of `window` tokens, with the exported model and with the reference,
    if there is one.

    Args:
        program_dir: `model.pte` and `model.ptd`, for whatever the runner finds here: CPU or GPU.
        model_dir: the Hugging Face checkpoint with its tokenizer, as the reference.
        reference_program: another program of the same vocabulary, as the reference. Texts are read
            by the tokenizer of `model_dir`, or of `program_dir` where there is none; that of the
            other model, if it has one, must give the same tokens.
        progress: called with the tokens that are predicted and their number.

    Raises:
        ConfigError: names the file, the flag or the program at fault; what the runner says where it
            fails.
    """
    if model_dir is not None and reference_program is not None:
        raise ConfigError("--model-dir and --reference-program: expected at most one reference")
    windows = _read_windows(text, program_dir, model_dir, reference_program, window)
    total, done = sum(len(w) - 1 for w in windows), 0
    with contextlib.ExitStack() as stack:
        exported = stack.enter_context(ProgramLogits(runner, program_dir, windows))
        vocabulary = exported.vocabulary  # known once its weights are on a GPU, if it is for one
        reference = _open_reference(stack, windows, runner, model_dir, reference_program)
        if reference is not None and reference.vocabulary != vocabulary:
            raise ConfigError(
                f"{program_dir}: vocabulary of {vocabulary}, "
                f"{reference_program or model_dir} has {reference.vocabulary}"
            )
        comparison = _Comparison(exported, reference)
        for ids in map(torch.tensor, windows):
            # Row i predicts token i + 1.
            rows = len(ids) - 1
            in_half = torch.arange(rows) >= (window // 2 if len(ids) == window else rows)
            for targets, half in zip(ids[1:].split(ROWS), in_half.split(ROWS), strict=True):
                comparison.add(targets, half)
                done += len(targets)
                progress(done, total)
    return comparison.result(window > 2 and sum(len(w) == window for w in windows) > 1)
