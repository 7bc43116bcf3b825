"""The training of the demo model's head for multi-token prediction, with the model as it is.

The head is Hugging Face's `MtpLayer` around the model's own decoder layer. It learns to predict
what the model would: its target is the model's distribution, not the text, for a draft is accepted
if the model draws it. A step unrolls the head one, two or three times, as drafting does: the head's
state behind a row stands in for the model's behind the next one.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
)

from et_moe.scripts.demo_training.batches import Batch, Conversations, Documents, mixed
from et_moe.scripts.demo_training.model import balance_loss
from et_moe.scripts.demo_training.rounding import ROUNDED_FROM, rounding
from et_moe.scripts.demo_training.schedule import Optimizer, Progress

NAMES = {
    "eh_proj.": "fc.",
    "enorm.": "pre_fc_norm_embedding.",
    "hnorm.": "pre_fc_norm_hidden.",
    "mtp_block.": "layers.0.",
    "post_norm.": "norm.",
}
"""How names of parameters begin in Hugging Face's layer -> in Qwen's checkpoints, behind "mtp."."""
DEPTH = 3
BALANCE_COEFFICIENT = 0.01
LOGGED_EVERY = 60


def make_head(model: Qwen3_5MoeForCausalLM) -> MtpLayer:
    """A head with random weights for a model: one layer of full attention."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    head = MtpLayer(config, Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm, 0)
    for module in head.modules():
        model._init_weights(module)
    return head.to(model.device)


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a head by their names in a checkpoint, in bfloat16."""
    renamed = {}
    for name, tensor in state.items():
        old = next(n for n in NAMES if name.startswith(n))
        renamed[f"mtp.{NAMES[old]}{name.removeprefix(old)}"] = tensor.to("cpu", torch.bfloat16)
    return renamed


class Unrolled(nn.Module):
    """A head behind a model that is not trained."""

    def __init__(self, model: Qwen3_5MoeForCausalLM, head: MtpLayer) -> None:
        super().__init__()
        self._model = (model.eval().requires_grad_(False),)  # in a tuple: no parameters of this
        self.head, self.routed = head, []
        head.mtp_block.mlp.gate.register_forward_hook(
            lambda module, inputs, outputs: self.routed.append(outputs[0])
        )

    def _unroll(self, tokens: Tensor, depth: int) -> tuple[Tensor, list[Tensor]]:
        """The model's logits behind tokens 1 to T - 1, and the head's for the same places, by
        number of the draft; each float [B, T - 1, V]."""
        (model,) = self._model
        with torch.no_grad():
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = model.lm_head(hidden[:, 1:])
            embedded = model.model.embed_tokens(tokens[:, 1:])
            positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(3, 1, -1)
            rotation = model.model.rotary_emb(embedded, positions)
        state, drafts = hidden[:, :-1], []
        for _ in range(depth):
            out = self.head(embedded, state, rotation, None, None, None)
            drafts.append(model.lm_head(out))
            state = torch.cat((hidden[:, :1], out[:, :-1]), dim=1)
        return wanted, drafts

    def forward(self, batch: Batch, depth: int) -> list[Tensor]:
        """The mean divergence of the head's predictions from the model's, by number of the draft.

        It is taken where the token to predict, the second after a row's state, is a learned one.
        """
        wanted, drafts = self._unroll(batch.tokens, depth)
        target = F.log_softmax(wanted[:, :-1], -1)
        losses = []
        for number, draft in enumerate(drafts):
            learned = batch.learned[:, 2 + number :]
            predicted = F.log_softmax(draft[:, number:-1], -1)
            each = F.kl_div(predicted, target[:, number:], log_target=True, reduction="none")
            losses.append((each.sum(-1) * learned).sum() / learned.sum().clamp(min=1))
        return losses

    def guesses(self, tokens: Tensor, depth: int) -> tuple[Tensor, list[Tensor]]:
        """The likeliest tokens, by the model and by the head's drafts: int64 [B, T - 1]."""
        wanted, drafts = self._unroll(tokens, depth)
        self.routed.clear()
        return wanted.argmax(-1), [draft.argmax(-1) for draft in drafts]


def train(
    model: Qwen3_5MoeForCausalLM,
    conversations: Conversations,
    documents: Documents,
    progress: Progress,
    seed: int,
    log: Callable[[str], None],
) -> Unrolled:
    """A head trained until `progress` is done."""
    unrolled = Unrolled(model, make_head(model))
    optimizer = Optimizer(unrolled.head, progress)
    for batch in mixed(conversations, documents, progress, seed):
        unrolled.routed.clear()
        on = progress.share >= ROUNDED_FROM
        with rounding(model, on), rounding(unrolled.head, on):
            losses = unrolled(batch, 1 + progress.step % DEPTH)
            balance = balance_loss(unrolled.routed, model.config)
            (torch.stack(losses).mean() + BALANCE_COEFFICIENT * balance).backward()
        optimizer.step()
        if progress.step % LOGGED_EVERY == 0 or progress.share >= 1:
            shown = ", ".join(f"{loss.item():.3f}" for loss in losses)
            log(
                f"head: step {progress.step} divergence of drafts {shown} "
                f"balance {balance.item():.3f} seconds {progress.seconds:.0f}"
            )
    return unrolled
