"""How far a training is, by its steps or by the clock, and the optimizer that follows it."""

import copy
import math
import time

import torch
from torch import Tensor, nn

PEAK_LR = 3e-3
WARMUP = 0.02
LEAST_LR = 0.02
CHECKED_EVERY = 50


class Progress:
    """The share of a training that is done.

    Args:
        steps: how many there are; None if time alone ends it.
        end: when it ends, by `time.monotonic`; None if steps alone end it.
    """

    def __init__(self, steps: int | None = None, end: float | None = None) -> None:
        if steps is None and end is None:
            raise ValueError("progress: expected a number of steps or an end")
        self.step, self._steps, self._end = 0, steps, end
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begin

    @property
    def share(self) -> float:
        """From 0 to 1."""
        by_steps = 0.0 if self._steps is None else self.step / self._steps
        by_time = 0.0
        if self._end is not None:
            by_time = self.seconds / max(self._end - self._begin, 1e-9)
        return min(1.0, max(by_steps, by_time))


def learning_rate(share: float) -> float:
    """A linear warm-up and a cosine decay."""
    if share < WARMUP:
        return PEAK_LR * (share + 0.001) / (WARMUP + 0.001)
    cosine = 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))
    return PEAK_LR * (LEAST_LR + (1 - LEAST_LR) * cosine)


class Optimizer:
    """AdamW. A training that has run into numbers that are not finite goes on from where they were,
    half as fast."""

    def __init__(self, model: nn.Module, progress: Progress) -> None:
        self._model, self._progress = model, progress
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=PEAK_LR,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._scale = 1.0
        self._save()

    def _save(self) -> None:
        self._saved = copy.deepcopy((self._model.state_dict(), self._optimizer.state_dict()))

    def step(self) -> None:
        """One step down the gradient that `backward` has left."""
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._scale * learning_rate(self._progress.share)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._progress.step += 1
        if self._progress.step % CHECKED_EVERY == 0:
            self._check(norm)

    def _check(self, norm: Tensor) -> None:
        """Keeps the weights if all is well, else goes back."""
        if math.isfinite(norm.item()):
            self._save()
            return
        model, optimizer = copy.deepcopy(self._saved)
        self._model.load_state_dict(model)
        self._optimizer.load_state_dict(optimizer)
        self._scale /= 2
