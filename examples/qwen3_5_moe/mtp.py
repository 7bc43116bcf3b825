"""The head for multi-token prediction (MTP), which drafts tokens behind the one that was drawn.

From the model's hidden state of a row, h_t, and the token behind it, x_{t+1}, the head predicts
x_{t+2}: with e = norm(embedding of x_{t+1}) and h = norm(h_t), each with a norm of its own,

    u = fc [e | h];  u = decoder layer(u), full attention with a KV cache of the head's own;
    g_t = norm(u);   logits = the model's head (g_t).

g_t takes the place of h_{t+1} when the head drafts once more, x_{t+3} of g_t and x_{t+2}.

- h_t is the hidden state behind the model's final norm, the one that its head sees, and g_t the one
  behind the head's norm. So it is in vLLM (`qwen3_next_mtp.py`, `qwen3_5_mtp.py`, and `propose` of
  `spec_decode/eagle.py`), in SGLang (`qwen3_5_mtp.py`, whose states come from behind `model.norm`),
  and in llama.cpp since its pull request 24025. Others took the state in front of the final norm
  (llama.cpp and LightLLM before, ExLlamaV3): as the head has a norm for it the drafts look well,
  and are accepted less often. `docs/speculation.md` has figures.
- The first half of the columns of `fc` takes the embedding, in all of them.
- Row t lies at position t, as in vLLM; Hugging Face's `MtpModel` counts from t + 1. Only distances
  matter to RoPE, so both compute the same up to rounding.
- The cache is filled by the rows of the prompt: row t takes h_t and the prompt's x_{t+1}, the last
  row the token that was drawn, whose draft it makes. After a step that accepted some drafts, the
  rows of all tokens that the model has seen since are computed anew from its own h_t, which
  replaces what drafting left in the cache (vLLM and SGLang do so).

The norms' weights are zero-centred like the model's. Here `fc` is the sum of two projections, one
of each half, because the ops have a norm in front of each projection.
"""

from torch import Tensor, nn

from et_moe.backends import ops
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.examples.qwen3_5_moe.graph import DecoderLayer, Places, Qwen3_5Moe, State
from et_moe.examples.qwen3_5_moe.tensors import MTP_LAYER
from et_moe.pipeline.layers import Linear, Weight
from et_moe.pipeline.models import Graph, StateTensor
from et_moe.pipeline.storage import Precision


class Mtp(nn.Module):
    """The head's own weights; embedding and output head are the model's.

    Args:
        layer: makes its decoder layer.
    """

    def __init__(self, c: ModelConfig, p: Precision, layer: type[DecoderLayer]) -> None:
        super().__init__()
        h, eps, part = c.hidden_size, c.rms_norm_eps, "attention"
        self.pre_fc_norm_embedding = Weight(h, dtype=p.dtype)
        self.pre_fc_norm_hidden = Weight(h, dtype=p.dtype)
        self.fc_embedding = Linear("mtp.fc_embedding", part, h, h, eps, p)
        self.fc_hidden = Linear("mtp.fc_hidden", part, h, h, eps, p)
        self.layers = nn.ModuleList([layer(c, c.num_hidden_layers, p, MTP_LAYER)])
        self.norm = Weight(h, dtype=p.dtype)

    def forward(self, embedded: Tensor, hidden: Tensor, places: Places, state: State) -> Tensor:
        """What g_t is before the norm, `[B R, H]`, by embeddings and hidden states `[B R, H]`."""
        x = self.fc_embedding(embedded, self.pre_fc_norm_embedding.weight)
        x = self.fc_hidden(hidden, self.pre_fc_norm_hidden.weight, residual=x)
        for layer in self.layers:
            x = layer(x, places, state)
        return x


class Qwen3_5MoeMtp(Qwen3_5Moe):
    """The text model with its MTP head; run eagerly, the definition of what a draft is."""

    def __init__(
        self, c: ModelConfig, p: Precision, layer: type[DecoderLayer] = DecoderLayer
    ) -> None:
        super().__init__(c, p, layer)
        self.mtp = Mtp(c, p, layer)

    def state_spec(self) -> dict[str, StateTensor]:
        return super().state_spec() | self.kv_cache(f"{MTP_LAYER}.self_attn")

    def normed(self, hidden: Tensor) -> Tensor:
        """The states h_t of what `hidden` returns, `[T, H]`: behind the final norm."""
        return self._rms_norm(hidden, self.norm)

    def _rms_norm(self, x: Tensor, norm: Weight) -> Tensor:
        return ops.rms_norm(x, norm.weight, self.config.rms_norm_eps)

    def draft(
        self, hidden: Tensor, tokens: Tensor, places: Places, state: State
    ) -> tuple[Tensor, Tensor]:
        """One step of the head for every row.

        Args:
            hidden: `[B R, H]`, h_t of each row (`normed`), or g of the step before.
            tokens: `int64 [B, R]`, the token behind each row.
            places: of the rows, positions counted as for the model.
            state: tensors of `state_spec`; the head's KV cache is updated in place.

        Returns:
            g_t of each row, `[B R, H]`, and the logits of the token behind `tokens`,
            `float32 [B R, V]`. A draft is the greatest of them, the lowest id of equal ones.
        """
        embedded = self.embed_tokens(tokens.view(-1))
        states = self._rms_norm(self.mtp(embedded, hidden, places, state), self.mtp.norm)
        return states, self.lm_head(states.float())


def build(c: ModelConfig, p: Precision, layer: type[DecoderLayer]) -> Graph:
    """The model's graph, with the MTP head where the configuration has one."""
    return (Qwen3_5MoeMtp if c.mtp_num_hidden_layers else Qwen3_5Moe)(c, p, layer)
