"""What the demo model has learned, on text and conversations that it has not seen."""

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM

from et_moe.scripts.demo_data.samples import Packed
from et_moe.scripts.demo_training.batches import Conversations
from et_moe.scripts.demo_training.head import Unrolled

WINDOW = 512


@torch.no_grad()
def perplexity(
    model: Qwen3_5MoeForCausalLM, tokens: Tensor, window: int = WINDOW
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
            counts[layer] += chosen.bincount(minlength=config.num_experts).cpu()
    return math.exp(total / (len(tokens) - 1)), counts / counts.sum(-1, keepdim=True)


@torch.no_grad()
def exact_answers(
    model: Qwen3_5MoeForCausalLM, packed: Packed, size: int, device: torch.device
) -> dict[str, tuple[float, int]]:
    """By kind of conversation: the share of last answers that a greedy model gives to the letter
    behind the thinking that is there, and how many there are.

    Greedy decoding gives an answer exactly if each of its tokens is the likeliest one, so one pass
    over the text tells it.
    """
    model.eval()
    found: dict[str, list[bool]] = defaultdict(list)
    for rows, batch in Conversations(packed, size, device).in_order():
        hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        guessed = model.lm_head(hidden[:, :-1]).argmax(-1)
        places = torch.arange(1, batch.tokens.shape[1], device=device)
        begins = torch.from_numpy(packed.answers[rows]).to(device)
        counted = batch.kept[:, 1:] & (places >= begins[:, None])
        right = ((guessed == batch.tokens[:, 1:]) | ~counted).all(-1).tolist()
        for row, exact in zip(rows, right, strict=True):
            found[packed.kinds[row]].append(exact)
    return {kind: (sum(exact) / len(exact), len(exact)) for kind, exact in sorted(found.items())}


@torch.no_grad()
def acceptance(unrolled: Unrolled, conversations: Conversations, depth: int) -> list[float]:
    """The share of steps whose first, first two, ... drafts are what the model holds likeliest,
    where the text says what the assistant does."""
    unrolled.head.eval()
    accepted, steps = torch.zeros(depth, dtype=torch.int64), 0
    for _, batch in conversations.in_order():
        wanted, drafts = unrolled.guesses(batch.tokens, depth)
        # Draft d of the step at row t comes from row t + d, and stands for token t + d + 2.
        last = wanted.shape[1] - depth
        counted = batch.learned[:, 2 : 2 + last].clone()
        for d in range(1, depth):
            counted &= batch.learned[:, 2 + d : 2 + d + last]
        steps += int(counted.sum())
        for d, draft in enumerate(drafts):
            counted = counted & (draft[:, d : d + last] == wanted[:, d : d + last])
            accepted[d] += int(counted.sum())
    return [count / max(1, steps) for count in accepted.tolist()]
