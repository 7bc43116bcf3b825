"""How far an exported model is from the Hugging Face model: perplexity, KL divergence, top-1."""

import json
import math
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

from et_moe.pipeline.config import ConfigError, read_text
from et_moe.pipeline.models import load_config

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""How transformers opens a checkpoint: no network, and none of the code that it may bring."""


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens.

    Attributes:
        tokens: how many were predicted.
        reference_perplexity, perplexity: of the Hugging Face model (in the checkpoint's dtype) and
            of the exported one.
        kl_divergence: of the exported model's distribution from the reference's, in nats.
        top1_agreement: share of positions where both have the same likeliest token.
    """

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float

    @property
    def perplexity_growth(self) -> float:
        """perplexity / reference_perplexity - 1."""
        return self.perplexity / self.reference_perplexity - 1

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"perplexity_growth": self.perplexity_growth})

    def to_table(self) -> str:
        rows = (
            ("Predicted tokens", f"{self.tokens}"),
            ("Perplexity, reference", f"{self.reference_perplexity:.4f}"),
            ("Perplexity, exported", f"{self.perplexity:.4f} ({self.perplexity_growth:+.2%})"),
            ("KL divergence", f"{self.kl_divergence:.5f} nats"),
            ("Top-1 agreement", f"{self.top1_agreement:.2%}"),
        )
        return "\n".join(f"  {name:<22} {value}" for name, value in rows)


def runner_logits(runner: Path, program_dir: Path, ids: list[int]) -> torch.Tensor:
    """Logits of the exported model that predict ids[1:], `float32 [len(ids) - 1, V]`."""
    with tempfile.TemporaryDirectory() as folder:
        ids_path, logits_path = Path(folder, "ids.json"), Path(folder, "logits.npy")
        ids_path.write_text(json.dumps(ids))
        command = [
            runner,
            f"--model_path={program_dir / 'model.pte'}",
            f"--data_path={program_dir / 'model.ptd'}",
            f"--score_ids_path={ids_path}",
            f"--logits_path={logits_path}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as e:
            raise ConfigError(f"{runner}: cannot be run ({e.strerror}); is it built?") from None
        if done.returncode:
            raise ConfigError(f"{runner} failed: {done.stderr.strip()}")
        return torch.from_numpy(numpy.load(logits_path))


def evaluate(
    model_dir: Path,
    program_dir: Path,
    text: Path,
    runner: Path,
    window: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Scores `text` in windows of `window` tokens with both models.

    Args:
        model_dir: the Hugging Face checkpoint with its tokenizer.
        program_dir: `model.pte` and `model.ptd` exported from it.
        progress: called with the windows done and their number.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if window < 2:
        raise ConfigError(f"--window {window}: expected at least 2 tokens")
    content = read_text(text)
    load_config(model_dir)  # names what is missing, before transformers would ask a hub for it
    ids = AutoTokenizer.from_pretrained(model_dir, **LOCAL)(content)["input_ids"]
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ConfigError(f"{text}: holds fewer than two tokens")
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype="auto", use_safetensors=True, **LOCAL
    ).eval()
    count, agree = 0, 0
    nll = reference_nll = kl = 0.0
    for done, piece in enumerate(windows, start=1):
        with torch.no_grad():
            # Without a cache: that of transformers wants a layer of full attention.
            logits = model(torch.tensor([piece]), use_cache=False).logits[0, :-1]
        reference = logits.double().log_softmax(-1)
        scored = runner_logits(runner, program_dir, piece)
        if scored.shape != logits.shape:
            ours, theirs = scored.shape[1], logits.shape[1]
            raise ConfigError(f"{program_dir}: vocabulary of {ours}, {model_dir} has {theirs}")
        exported = scored.double().log_softmax(-1)
        targets = torch.tensor(piece[1:])[:, None]
        nll -= exported.gather(1, targets).sum().item()
        reference_nll -= reference.gather(1, targets).sum().item()
        kl += (reference.exp() * (reference - exported)).sum().item()
        agree += int((reference.argmax(-1) == exported.argmax(-1)).sum())
        count += len(piece) - 1
        progress(done, len(windows))
    return Evaluation(
        count, math.exp(reference_nll / count), math.exp(nll / count), kl / count, agree / count
    )
