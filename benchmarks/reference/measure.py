"""Trains the reference model, quantizes it in many ways, and measures what each way costs.

One command within a time limit: what has been measured so far is in the result file at any time,
and what does not fit into the time is left out.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from et_moe.benchmarks.reference.recipes import METHODS, Row, rows, single_parts
from et_moe.benchmarks.reference.simulated import Simulation
from et_moe.benchmarks.reference.training import Batch, Text, make_model, model_config, train
from et_moe.benchmarks.result import provenance, write_result
from et_moe.pipeline.footprint import Footprint, footprint
from et_moe.pipeline.importance import Moments
from et_moe.pipeline.models import parse_config
from et_moe.pipeline.quantize import meta_graph
from et_moe.pipeline.storage import Precision

TRAINING = 0.62
"""Share of the time that the training may take."""

AT_ONCE = 16
"""Windows of a forward pass."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        windows: of held-out text, `context` tokens each; calibration: of the text that
            importance is measured on, likewise.
    """

    batch: Batch = field(default_factory=Batch)
    windows: int = 80
    calibration: int = 128


@torch.no_grad()
def log_probabilities(model: Qwen3_5MoeForCausalLM, windows: Tensor) -> Iterable[Tensor]:
    """Log probabilities of all tokens but each window's first, float32 `[n, T - 1, V]` a piece."""
    for piece in windows.split(AT_ONCE):
        yield model(input_ids=piece, use_cache=False).logits[:, :-1].float().log_softmax(-1)


class Reference:
    """What the model predicts as it is.

    Attributes:
        nll: mean negative log likelihood of a token.
    """

    def __init__(self, model: Qwen3_5MoeForCausalLM, windows: Tensor) -> None:
        self._model, self._windows = model, windows
        self._expected = list(log_probabilities(model, windows))
        self.nll = self._nll(self._expected)

    @property
    def positions(self) -> int:
        return self._windows[:, 1:].numel()

    def _nll(self, predicted: Iterable[Tensor]) -> float:
        total = 0.0
        for piece, targets in zip(predicted, self._windows.split(AT_ONCE), strict=True):
            total -= piece.gather(-1, targets[:, 1:, None]).double().sum().item()
        return total / self.positions

    def compare(self) -> dict[str, float]:
        """The model as it is now against what it was: means over all positions, and the standard
        error of the divergence by windows."""
        nll, agree, divergences = 0.0, 0, []
        pieces = zip(
            log_probabilities(self._model, self._windows),
            self._expected,
            self._windows.split(AT_ONCE),
            strict=True,
        )
        for predicted, expected, windows in pieces:
            nll -= predicted.gather(-1, windows[:, 1:, None]).double().sum().item()
            agree += int((predicted.argmax(-1) == expected.argmax(-1)).sum())
            kl = (expected.exp() * (expected - predicted)).sum(-1)
            divergences.append(kl.double().mean(-1))
        by_window = torch.cat(divergences)
        return {
            "kl": by_window.mean().item(),
            "kl_error": (by_window.std() / math.sqrt(len(by_window))).item(),
            "top1": agree / self.positions,
            "perplexity": math.exp(nll / self.positions),
        }


def taken(config: Qwen3_5MoeTextConfig, row: Row, simulation: Simulation) -> Footprint:
    """What a row's weights take."""
    text = config.to_dict() | {"model_type": "qwen3_5_moe_text"}
    parsed = parse_config(text, where="reference model")
    base = footprint(meta_graph(parsed, Precision(row.parts)))
    size, token, plain = base.size, base.bytes_per_token, replace(row, exceptions={})
    for name, weight in simulation.weights.items():
        more = _stored_bytes(row, name, weight) - _stored_bytes(plain, name, weight)
        chosen = config.num_experts_per_tok / config.num_experts if weight.dim() == 3 else 1
        size, token = size + more, token + round(more * chosen)
    return Footprint(base.weights, size, token)


def _stored_bytes(row: Row, name: str, weight: Tensor) -> int:
    entries = row.storage_of(name).tensors(name, weight.shape, torch.bfloat16).values()
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries)


def shares(moments: dict[str, Moments]) -> list[float]:
    """The smallest and the largest share of an expert in the routing of its layer."""
    counts = [m.rows for name, m in moments.items() if name.endswith("experts.gate_up_proj")]
    each = torch.stack([rows / rows.sum() for rows in counts])
    return [each.min().item(), each.max().item()]


class Run:
    """A result that grows, and the time that is left for it."""

    def __init__(self, out: Path, minutes: float) -> None:
        self._out, self._end = out, time.monotonic() + 60 * minutes
        self.result = provenance() | {"minutes": minutes}

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def add(self, name: str, row: dict) -> None:
        """Adds a row to a list of the result, prints and writes it."""
        print(name, row, flush=True)
        self.result.setdefault(name, []).append(row)
        write_result(self._out, self.result)

    def set(self, **values: object) -> None:
        """Sets entries of the result and writes it."""
        print(values, flush=True)
        self.result |= values
        write_result(self._out, self.result)


def _measure_rows(
    run: Run,
    simulation: Simulation,
    reference: Reference,
    importance: dict[str, Tensor],
    name: str,
    todo: Iterable[Row],
) -> None:
    for row in todo:
        if run.left() < 0:
            print(f"no time is left for {name} from {row.name!r} on", flush=True)
            return
        method, weighed = METHODS[row.scales]
        simulation.quantize(
            row.storage_of, row.activations == "int8", method, importance if weighed else None
        )
        size = taken(simulation.model.config, row, simulation)
        entry = {"recipe": row.name, "scales": row.scales, "activations": row.activations}
        entry |= {"bits": size.bits_per_weight, "bytes_per_token": size.bytes_per_token}
        run.add(name, entry | reference.compare())


def as_saved(model: Qwen3_5MoeForCausalLM) -> None:
    """The weights that a bfloat16 checkpoint of the model would have, in float32."""
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def measure(
    text: Text,
    out: Path,
    minutes: float,
    seed: int,
    sizes: Sizes | None = None,
    config: Qwen3_5MoeTextConfig | None = None,
) -> None:
    """Trains and measures on the first GPU, or on the CPU where there is none.

    Args:
        minutes: that the command may take.
        sizes: of batches and of what is measured.
        config: of another model than `model_config` makes.
    """
    run, sizes = Run(out, minutes), sizes or Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, context = config or model_config(text.tokenizer), sizes.batch.context
    torch.manual_seed(seed)
    model = make_model(config, device)
    count = sum(p.numel() for p in model.parameters())
    run.set(parameters=count, config=config.to_dict(), text=text.sources, seed=seed)
    tokens = text.tokens("train").to(device)
    torch.set_float32_matmul_precision("high")
    seconds = TRAINING * run.left()
    train(model, tokens, sizes.batch, seconds, seed, lambda row: run.add("training", row))
    torch.set_float32_matmul_precision("highest")
    as_saved(model)
    simulation = Simulation(model)
    held_out = text.windows("heldout", sizes.windows, context).to(device)
    reference = Reference(model, held_out)
    counts = text.sources["parts"]["heldout"]
    bits = reference.nll / math.log(2) * counts["tokens"] / counts["bytes"]
    calibration = text.windows("calibrate", sizes.calibration, context).to(device)
    moments = simulation.moments(calibration)
    run.set(
        positions=reference.positions,
        perplexity=math.exp(reference.nll),
        bits_per_byte=bits,
        calibration_tokens=calibration.numel(),
        expert_shares=shares(moments),
    )
    importance = {name: sums.mean() for name, sums in moments.items()}
    for name, todo in (("rows", rows()), ("parts", single_parts())):
        _measure_rows(run, simulation, reference, importance, name, todo)
    run.set(seconds=round(60 * minutes - run.left(), 1))
