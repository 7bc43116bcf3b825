"""Train the demo checkpoint's head for multi-token prediction, with the model itself as it is.

    python scripts/train_demo_mtp.py --checkpoint DIR [--steps N] [--seed S]

The head is Hugging Face's `MtpLayer` around the model's own decoder layer. It learns to predict
what the model would: its target is the model's distribution, not the text, for a draft is accepted
if the model draws it. The text is that of `train_demo.py` without what `heldout.txt` holds. A step
unrolls the head one, two or three times, as drafting does: the head's state behind a row stands in
for the model's behind the next one. The same Python, seed and number of steps give the same head.
"""

import copy
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
)

from et_moe.scripts.train_demo import (
    BALANCE_COEFFICIENT,
    Optimizer,
    balance_loss,
    batches,
    be_deterministic,
    collect_documents,
    encode_stream,
)

NAMES = {
    "eh_proj.": "fc.",
    "enorm.": "pre_fc_norm_embedding.",
    "hnorm.": "pre_fc_norm_hidden.",
    "mtp_block.": "layers.0.",
    "post_norm.": "norm.",
}
"""How names of parameters begin in Hugging Face's layer -> in Qwen's checkpoints, behind "mtp."."""
DEPTH = 3


def make_head(model: Qwen3_5MoeForCausalLM) -> MtpLayer:
    """A head with random weights for a model: one layer of full attention."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    head = MtpLayer(config, Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm, 0)
    for module in head.modules():
        model._init_weights(module)
    return head


def to_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a head by their names in a checkpoint, in bfloat16."""
    renamed = {}
    for name, tensor in state.items():
        old = next(n for n in NAMES if name.startswith(n))
        renamed[f"mtp.{NAMES[old]}{name.removeprefix(old)}"] = tensor.to(torch.bfloat16)
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

    def forward(self, tokens: Tensor, depth: int) -> list[Tensor]:
        """The divergence of the head's predictions from the model's, by number of the draft.

        Args:
            tokens: int64 [B, T].
            depth: how many drafts follow a token.
        """
        (model,) = self._model
        with torch.no_grad():
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = F.log_softmax(model.lm_head(hidden[:, 1:]), -1)
            embedded = model.model.embed_tokens(tokens[:, 1:])
            positions = torch.arange(tokens.shape[1] - 1).expand(3, 1, -1)
            rotation = model.model.rotary_emb(embedded, positions)
        state, losses = hidden[:, :-1], []
        for draft in range(depth):
            out = self.head(embedded, state, rotation, None, None, None)
            predicted = F.log_softmax(model.lm_head(out[:, draft:]), -1)
            losses.append(
                F.kl_div(predicted, wanted[:, draft:], log_target=True, reduction="none")
                .sum(-1)
                .mean()
            )
            state = torch.cat((hidden[:, :1], out[:, :-1]), dim=1)
        return losses


def train(model: Qwen3_5MoeForCausalLM, tokens: Tensor, steps: int, seed: int) -> MtpLayer:
    """A head trained on batches of `tokens`, int64 [n]."""
    unrolled = Unrolled(model, make_head(model))
    optimizer = Optimizer(unrolled.head, steps)
    start = time.monotonic()
    for step, batch in zip(range(steps), batches(tokens, seed), strict=False):
        unrolled.routed.clear()
        losses = unrolled(batch, 1 + step % DEPTH)
        balance = balance_loss(unrolled.routed, model.config)
        optimizer.step(torch.stack(losses).mean() + BALANCE_COEFFICIENT * balance)
        if step % 48 == 47 or step == steps - 1:
            shown = ", ".join(f"{loss.item():.3f}" for loss in losses)
            typer.echo(
                f"step {step} divergence of drafts {shown} balance {balance.item():.3f} "
                f"{time.monotonic() - start:.0f} s"
            )
    return unrolled.head


def save(head: MtpLayer, checkpoint: Path) -> None:
    """Adds a head to a checkpoint of one file, or replaces the one that it has."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
    config = json.loads((checkpoint / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    with tempfile.TemporaryDirectory(dir=checkpoint, prefix=".tmp") as temporary:
        folder = Path(temporary)
        tensors |= to_checkpoint(head.state_dict())
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text)
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / name, checkpoint / name)


def main(
    checkpoint: Annotated[Path, typer.Option(help="directory of `train_demo.py`'s checkpoint")],
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 400,
    seed: Annotated[int, typer.Option(help="of the weights and the batches")] = 0,
) -> None:
    """Train a head for multi-token prediction and add it to the checkpoint."""
    be_deterministic(seed)
    held_out = (checkpoint / "heldout.txt").read_text()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    training = [text for text in collect_documents().values() if text not in held_out]
    model = Qwen3_5MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    save(train(model, encode_stream(tokenizer, training), steps, seed), checkpoint)


if __name__ == "__main__":
    typer.run(main)
