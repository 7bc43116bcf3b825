"""Train the demo checkpoint: a small Qwen3.5 MoE that writes Python documentation.

    python scripts/train_demo.py --output DIR [--steps N] [--seed S]

The text is the documentation in the running Python's standard library: the docstrings of its
modules and the language reference behind `help()` (PSF licence). The same Python, seed and number
of steps give the same checkpoint on one machine.
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

from et_moe.examples.qwen3_5_moe.tokenizer import (
    END_OF_TEXT,
    IM_END,
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    byte_alphabet,
    tokenizer_json,
)
from et_moe.pipeline.make_checkpoint import write_tokenizer

VOCAB_SIZE = 2048
CONTEXT = 256
BATCH = 8
PEAK_LR = 3e-3
WARMUP_STEPS = 100
BALANCE_COEFFICIENT = 0.01
HELD_OUT_BYTES = 30_000
EXCLUDED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-"})


def clean(text: str) -> str:
    """The text with plain quotes, and without spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.translate(TO_ASCII).strip().splitlines())


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings at and below `node`, in source order and without their indentation."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
        yield clean(text)
    for child in ast.iter_child_nodes(node):
        yield from docstrings(child)


def collect_documents() -> dict[str, str]:
    """A text for the name of each standard library module and of each topic of `help()`.

    No docstring appears twice; those that are shorter than 20 characters or not ASCII are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRECTORIES & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # lib2to3 and others keep templates that are not Python 3
            continue
        kept = []
        for text in docstrings(tree):
            if len(text) >= 20 and text.isascii() and text not in seen:
                seen.add(text)
                kept.append(text)
        if kept:
            documents[relative.as_posix()] = "\n\n".join(kept)
    for name, text in sorted(topics.items()):
        documents[f"topic {name}"] = clean(text)
    return documents


def split_held_out(documents: dict[str, str], seed: int) -> tuple[list[str], list[str]]:
    """The training and the held-out documents, both shuffled; no topic is held out."""
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    held_out: list[str] = []
    size = 0
    for name in names:
        length = len(documents[name])
        if size < HELD_OUT_BYTES and not name.startswith("topic ") and 500 < length < 6000:
            held_out.append(name)
            size += length
    training = [documents[name] for name in names if name not in held_out]
    return training, [documents[name] for name in held_out]


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens, added ones included, with merges from `documents`."""
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json() | {"added_tokens": []}))
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(PLAIN_ADDED_TOKENS),
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return Tokenizer.from_str(json.dumps(tokenizer_json(merges)))


def model_config(tokenizer: Tokenizer) -> Qwen3_5MoeTextConfig:
    """A small model with every feature of Qwen3.5 MoE; INT4 groups of 128 divide all widths."""
    return Qwen3_5MoeTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )


def encode_stream(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """The documents' tokens, int64 [n], with END_OF_TEXT after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor(
        [token for text in documents for token in [*tokenizer.encode(text).ids, end]]
    )


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Yields int64 [BATCH, CONTEXT] without end; each epoch cuts the stream at a new offset and
    shuffles the pieces."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        count = (len(tokens) - offset) // CONTEXT
        blocks = tokens[offset : offset + count * CONTEXT].view(count, CONTEXT)
        yield from blocks[torch.randperm(count, generator=generator)].split(BATCH)


def balance_loss(router_logits: Sequence[Tensor], config: Qwen3_5MoeTextConfig) -> Tensor:
    """The load balancing loss of Switch Transformer (arXiv 2101.03961), averaged over the layers.

    Hugging Face's own `aux_loss` sums the layers before it balances, which lets a layer ignore
    most of its experts while another makes up for it.
    """
    experts, top_k = config.num_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits,), experts, top_k) for logits in router_logits]
    return torch.stack(losses).mean()


class Optimizer:
    """AdamW with a linear warm-up and a cosine decay to 5% of the peak, for so many steps."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self._model = model
        self._optimizer = _adamw(model)
        warmup = min(WARMUP_STEPS, max(1, steps // 10))

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, steps - warmup)
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, scale)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )


def train(model: Qwen3_5MoeForCausalLM, tokens: Tensor, steps: int, seed: int) -> None:
    """Trains a model on batches of `tokens`, int64 [n]."""
    optimizer = Optimizer(model, steps)
    model.train()
    start = time.monotonic()
    for step, batch in zip(range(steps), batches(tokens, seed), strict=False):
        output = model(input_ids=batch, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config)
        optimizer.step(loss + BALANCE_COEFFICIENT * balance)
        if step % 50 == 0 or step == steps - 1:
            typer.echo(
                f"step {step} loss {loss.item():.3f} balance {balance.item():.3f} "
                f"{time.monotonic() - start:.0f} s"
            )


@torch.no_grad()
def evaluate(
    model: Qwen3_5MoeForCausalLM, tokens: Tensor, window: int = 2 * CONTEXT
) -> tuple[float, Tensor]:
    """Perplexity of `tokens`, int64 [n], and the share of each expert in the routing.

    Each token but the first is scored once, given those before it in its window. The shares are
    float32 [layers, experts]; a row sums to 1.
    """
    model.eval()
    config = model.config
    total = 0.0
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for begin in range(0, len(tokens) - 1, window):
        piece = tokens[begin : begin + window + 1]
        output = model(input_ids=piece[None, :-1], output_router_logits=True, use_cache=False)
        total += F.cross_entropy(output.logits[0].float(), piece[1:], reduction="sum").item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += chosen.bincount(minlength=config.num_experts)
    return math.exp(total / (len(tokens) - 1)), counts / counts.sum(-1, keepdim=True)


def save_checkpoint(
    model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, held_out: str, output: Path
) -> None:
    """Write the bfloat16 checkpoint, its tokenizer and the held-out text, each file by a rename."""
    output.mkdir(parents=True, exist_ok=True)
    end, im_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(IM_END)
    model.generation_config = GenerationConfig(eos_token_id=[im_end, end], pad_token_id=end)
    with tempfile.TemporaryDirectory(dir=output, prefix=".tmp") as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        fields = json.loads(tokenizer.to_str())
        write_tokenizer(fields, Path(temporary), model.config.max_position_embeddings)
        (Path(temporary) / "heldout.txt").write_text(held_out)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, output / path.name)


def be_deterministic(seed: int) -> None:
    """From now on the same training gives the same weights."""
    torch.set_num_threads(1)  # the result depends on the number of threads
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def main(
    output: Annotated[Path, typer.Option(help="directory to write the checkpoint into")],
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 2000,
    seed: Annotated[int, typer.Option(help="of the split, the weights and the batches")] = 0,
) -> None:
    """Train the demo checkpoint and write it in Hugging Face layout."""
    be_deterministic(seed)
    training, held_out = split_held_out(collect_documents(), seed)
    tokenizer = train_tokenizer(training)
    tokens = encode_stream(tokenizer, training)
    held_out_text = "\n\n".join(held_out) + "\n"
    model = Qwen3_5MoeForCausalLM(model_config(tokenizer))
    typer.echo(
        f"{sum(map(len, training))} bytes of text, {len(tokens)} tokens, "
        f"{sum(p.numel() for p in model.parameters())} parameters"
    )
    train(model, tokens, steps, seed)

    model.to(torch.bfloat16).to(torch.float32)  # what is measured is what is saved
    held_out_tokens = torch.tensor(tokenizer.encode(held_out_text).ids)
    perplexity, shares = evaluate(model, held_out_tokens)
    typer.echo(
        f"held-out: perplexity {perplexity:.3f} per token, "
        f"{math.log2(perplexity) * len(held_out_tokens) / len(held_out_text):.3f} bits per byte, "
        f"expert shares {shares.min():.3f} to {shares.max():.3f}"
    )
    if shares.min() == 0:
        raise SystemExit("an expert is never chosen on the held-out text: nothing is written")
    save_checkpoint(model, tokenizer, held_out_text, output)


if __name__ == "__main__":
    typer.run(main)
