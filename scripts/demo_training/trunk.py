"""The training of the demo model, without its head for multi-token prediction."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM

from et_moe.scripts.demo_training.batches import Batch, Conversations, Documents, mixed
from et_moe.scripts.demo_training.model import balance_loss
from et_moe.scripts.demo_training.rounding import ROUNDED_FROM, rounding
from et_moe.scripts.demo_training.schedule import Optimizer, Progress

BALANCE_COEFFICIENT = 0.01
LOGGED_EVERY = 100

Log = Callable[[str], None]


def losses_of(model: Qwen3_5MoeForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross entropy of the learned tokens, and the balance loss, both scalars."""
    output = model.model(input_ids=batch.tokens, output_router_logits=True, use_cache=False)
    learned = batch.learned[:, 1:]
    logits = model.lm_head(output.last_hidden_state[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    loss = (each * learned.flatten()).sum() / learned.sum().clamp(min=1)
    kept = batch.kept.flatten().nonzero().squeeze(1)
    routed = [logits[kept] for logits in output.router_logits]
    return loss, balance_loss(routed, model.config)


def train(
    model: Qwen3_5MoeForCausalLM,
    conversations: Conversations,
    documents: Documents,
    progress: Progress,
    seed: int,
    log: Log,
) -> None:
    """Trains a model until `progress` is done."""
    optimizer = Optimizer(model, progress)
    model.train()
    shown: dict[str, list[torch.Tensor]] = {"conversations": [], "documents": []}
    tokens = 0
    for batch in mixed(conversations, documents, progress, seed):
        with rounding(model, progress.share >= ROUNDED_FROM):
            loss, balance = losses_of(model, batch)
            (loss + BALANCE_COEFFICIENT * balance).backward()
        optimizer.step()
        tokens += batch.tokens.numel()
        shown[batch.kind].append(loss.detach())
        if progress.step % LOGGED_EVERY == 0 or progress.share >= 1:
            means = {k: torch.stack(v).mean().item() for k, v in shown.items() if v}
            said = " ".join(f"{kind} {mean:.3f}" for kind, mean in means.items())
            log(
                f"step {progress.step} loss: {said} balance {balance.item():.3f} "
                f"tokens {tokens} seconds {progress.seconds:.0f}"
            )
            for losses in shown.values():
                losses.clear()
