"""Trains the reference model for so many minutes on a GPU.

Weights are bfloat16, with fp32 masters in the optimizer. The learning rate follows the clock, so
that the training ends in time whatever a step takes; two runs give two models.
"""

import json
import lzma
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from et_moe.benchmarks.reference.forward import Forward
from et_moe.examples.qwen3_5_moe.tokenizer import END_OF_TEXT
from et_moe.pipeline.config import ConfigError

PEAK_LR = 1.2e-3
WARMUP = 0.03
LAST_LR = 0.03
BALANCE_COEFFICIENT = 0.01


@dataclass(frozen=True)
class Batch:
    """Sequences of a step, and tokens of each that are predicted."""

    sequences: int = 64
    context: int = 512


class Text:
    """What `scripts/reference_text.py` wrote.

    Raises:
        ConfigError: the folder lacks a file of it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("tokenizer.json", "sources.json", "train.bin.xz"):
            if not (folder / name).is_file():
                expected = "expected a folder of scripts/reference_text.py"
                raise ConfigError(f"{folder / name}: no such file, {expected}")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.sources = json.loads((folder / "sources.json").read_text())

    def tokens(self, part: str) -> Tensor:
        """The tokens of a part, int64 `[n]`."""
        packed = (self._folder / f"{part}.bin.xz").read_bytes()
        return torch.from_numpy(numpy.frombuffer(lzma.decompress(packed), "<u2").astype("int64"))

    def windows(self, part: str, count: int, context: int) -> Tensor:
        """Windows of a part that do not overlap, int64 `[at most count, context]`."""
        tokens = self.tokens(part)
        most = len(tokens) // context
        return tokens[: most * context].view(most, context)[:count]


def model_config(tokenizer: Tokenizer) -> Qwen3_5MoeTextConfig:
    """The reference's shape: 170 million parameters, with the head sizes of the 35B and its ratio
    of experts to the rest, so that a recipe takes as many bits a weight as it does there."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return Qwen3_5MoeTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=512,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        eos_token_id=end,
    )


def batches(tokens: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yields int64 `[sequences, context + 1]` without end, on the tokens' device: the last token
    of a row is only predicted. Each epoch cuts the stream at a new offset."""
    generator = torch.Generator().manual_seed(seed)
    step = batch.context
    while True:
        offset = int(torch.randint(step, (), generator=generator))
        rows = tokens[offset:].unfold(0, step + 1, step)
        order = torch.randperm(len(rows), generator=generator).to(tokens.device)
        for chosen in order.split(batch.sequences):
            if len(chosen) == batch.sequences:  # another size would be compiled anew
                yield rows[chosen]


class Optimizer:
    """AdamW over fp32 masters of a model's parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._masters = [p.detach().float().clone() for p in self._parameters]
        self._grads = [torch.zeros_like(m) for m in self._masters]
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.requires_grad_().grad = grad
        groups = [
            {"params": [m for m in self._masters if m.dim() >= 2], "weight_decay": 0.1},
            {"params": [m for m in self._masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """One step down the gradients; `progress` is the share of the time that has passed."""
        torch._foreach_copy_(self._grads, [p.grad for p in self._parameters])
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = PEAK_LR * schedule(progress)
        self._optimizer.step()
        torch._foreach_copy_(self._parameters, self._masters)
        for parameter in self._parameters:
            parameter.grad = None


def schedule(progress: float) -> float:
    """The learning rate's factor: a linear warm-up, and a cosine down to `LAST_LR`."""
    if progress < WARMUP:
        return (progress + 1e-3) / (WARMUP + 1e-3)
    rest = min(1.0, (progress - WARMUP) / (1 - WARMUP))
    return LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * rest))


def make_model(config: Qwen3_5MoeTextConfig, device: torch.device) -> Qwen3_5MoeForCausalLM:
    """A model with random weights, bfloat16 on a GPU and float32 on a CPU; vectors are float32."""
    with device:
        model = Qwen3_5MoeForCausalLM(config)
    if device.type == "cuda":
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.bfloat16()
    return model


def train(
    model: Qwen3_5MoeForCausalLM,
    tokens: Tensor,
    batch: Batch,
    seconds: float,
    seed: int,
    report: Callable[[dict], None],
) -> None:
    """Trains a model for so many seconds, in which compiling counts.

    Args:
        tokens: int64 `[n]`, on the model's device.
        report: is given a row now and then: step, tokens, seconds, loss, balance.
    """
    begin = time.monotonic()
    optimizer, first = Optimizer(model), None
    forward = Forward(model, compiled=tokens.is_cuda)
    for step, rows in enumerate(batches(tokens, batch, seed)):
        try:
            loss, balance = forward(rows)
            (loss + BALANCE_COEFFICIENT * balance).backward()
        except Exception as e:  # a compiler that fails: the same layers run without it
            if step or not tokens.is_cuda:
                raise
            print(f"not compiled: {type(e).__name__}: {e}"[:2000], flush=True)
            forward = Forward(model, compiled=False)
            model.zero_grad()
            continue
        now = time.monotonic()
        first = now if first is None else first
        progress = (now - first) / max(1e-9, begin + seconds - first)
        optimizer.step(progress)
        done = progress >= 1
        if step % 50 == 0 or step < 3 or done:
            row = {"step": step, "tokens": (step + 1) * batch.sequences * batch.context}
            row |= {"loss": loss.item(), "balance": balance.item()}
            report(row | {"seconds": round(time.monotonic() - begin, 1)})
        if done:
            return
