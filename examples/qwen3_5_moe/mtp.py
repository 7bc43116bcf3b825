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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from et_moe.backends.method_graph import SLOTS
from et_moe.backends.ops import PAGE_SIZE
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.examples.qwen3_5_moe.graph import DecoderLayer, Places, Qwen3_5Moe, State
from et_moe.examples.qwen3_5_moe.tensors import MTP_LAYER
from et_moe.pipeline.draft_head import DRAFT_HEAD
from et_moe.pipeline.layers import Linear, Weight
from et_moe.pipeline.models import MTP, Graph, StateTensor
from et_moe.pipeline.storage import Precision

et = torch.ops.et_moe

HIDDEN = f"{MTP}hidden"
"""State: h of the last row that a sequence was fed, `[1 + k, H]` with k drafts."""


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

    def _attend(
        self, embedded: Tensor, hidden: Tensor, places: Places, state: State, first_token: int
    ) -> tuple[Tensor, Tensor]:
        """What the layer takes, `[B R, H]`, and what its attention makes of it; fills the cache."""
        x = self.fc_embedding(embedded, self.pre_fc_norm_embedding.weight)
        x = self.fc_hidden(hidden, self.pre_fc_norm_hidden.weight, residual=x)
        (layer,) = self.layers
        norm = layer.input_layernorm.weight
        return x, layer.self_attn.attend(x, norm, places, state, first_token)

    def fill(self, embedded: Tensor, hidden: Tensor, places: Places, state: State) -> None:
        """Leaves rows in the KV cache, by embeddings and hidden states `[B R, H]`; attends to
        nothing."""
        self._attend(embedded, hidden, places, state, PAGE_SIZE * places.pages.shape[1])

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        places: Places,
        state: State,
        first_token: int = 0,
        accepted: Tensor | None = None,
    ) -> Tensor:
        """What g_t is before the norm, by embeddings and hidden states `[B R, H]`.

        Args:
            first_token: position of the first row that is attended to.
            accepted: `int64 [B]`, 0 to R - 2, where only the result of each sequence's row
                1 + accepted is wanted; None for all.

        Returns:
            `[B R, H]`, or `[B, H]` with `accepted`.
        """
        x, attended = self._attend(embedded, hidden, places, state, first_token)
        num_tokens, (layer,) = places.num_tokens, self.layers
        if accepted is not None:
            each = x.shape[0] // places.positions.shape[0]
            index, num_tokens = accepted.view(-1, 1), (num_tokens > 0).long()
            x, attended = (
                _row_of_each(rows.view(-1, each * rows.shape[1]).split(rows.shape[1], 1)[1:], index)
                for rows in (x, attended)
            )
        x = layer.self_attn.o_proj(attended, residual=x)
        return layer.mlp(x, layer.post_attention_layernorm.weight, num_tokens)


class Qwen3_5MoeMtp(Qwen3_5Moe):
    """The text model with its MTP head; run eagerly, the definition of what a draft is."""

    def __init__(
        self, c: ModelConfig, p: Precision, layer: type[DecoderLayer] = DecoderLayer
    ) -> None:
        super().__init__(c, p, layer)
        self.mtp = Mtp(c, p, layer)

    def shorten_drafts(self, vocabulary: int) -> None:
        eps, precision = self.config.rms_norm_eps, self.lm_head.precision
        sizes = (self.config.hidden_size, vocabulary, eps, precision)
        self.mtp.draft_head = Linear(DRAFT_HEAD.removesuffix("."), "head", *sizes)

    def state_spec(self, draft_tokens: int = 0) -> dict[str, StateTensor]:
        spec = super().state_spec(draft_tokens) | self.kv_cache(f"{MTP_LAYER}.self_attn")
        if draft_tokens:
            shape = (1 + draft_tokens, self.config.hidden_size)
            spec[HIDDEN] = StateTensor(self.dtype, SLOTS, shape)
        return spec

    def normed(self, hidden: Tensor) -> Tensor:
        """The states h_t of what `hidden` returns, `[T, H]`: behind the final norm."""
        return et.rms_norm(hidden, self.norm.weight, self.config.rms_norm_eps)

    def draft(
        self,
        hidden: Tensor,
        tokens: Tensor,
        places: Places,
        state: State,
        first_token: int = 0,
        accepted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of the head for every row.

        Args:
            hidden: `[B R, H]` or `[B, R, H]`, h_t of each row (`normed`), or g of the step before.
            tokens: `int64 [B, R]`, the token behind each row.
            places: of the rows, positions counted as for the model.
            state: tensors of `state_spec`; the head's KV cache is updated in place.
            first_token, accepted: see `Mtp.forward`.

        Returns:
            g_t of each row, `[B R, H]`, and the logits of the token behind `tokens`,
            `float32 [B R, V]`, or those of the tokens that are drafted. A draft is the greatest of
            them, the lowest id of equal ones.
        """
        embedded = self.embed_tokens(tokens.reshape(-1))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        x = self.mtp(embedded, hidden, places, state, first_token, accepted)
        states = et.rms_norm(x, self.mtp.norm.weight, self.config.rms_norm_eps)
        return states, getattr(self.mtp, "draft_head", self.lm_head)(states.float())

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        pages: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
        state: State,
        num_tokens: Tensor | None = None,
        versions: Tensor | None = None,
        draft_tokens: int = 0,
        full_logits: bool = False,
    ) -> tuple[Tensor, ...]:
        """Consumes tokens and draws the next one of each sequence; fed drafts, the next ones.

        The head's row that takes token t + 1 and h_t lies at position t + 1 of its cache. So what
        stands there follows from the tokens up to this one, as in every other cache, whichever call
        has computed it. The row at position 0 takes zeros for h, and is never attended to.

        Args:
            versions: `int64 [B]`, of the states that the sequences go on from.
            draft_tokens: 0, or k: of each sequence the R = 1 + k rows of `tokens` are the token
                that was drawn last and drafts of those behind it, and `num_tokens` is given. The
                others are as in `Qwen3_5Moe.forward`; with drafts there is no `full_logits`.

        Returns:
            Without drafts what `Qwen3_5Moe.forward` does. With drafts `int64 [B, 2 + k]`: a, how
            many drafts were what the row before them draws, the token that row a draws, and k
            drafts of those behind it. A draft is drawn as the model would draw it from its own
            logits, with the same noise.
        """
        drawing = (temperature, top_k, top_p, seed)
        places = Places(positions, slots, pages, num_tokens, versions, draft_tokens > 0)
        x = self.hidden(tokens, places, state)
        hidden = self.normed(x)
        last = (slots, versions, num_tokens, places.each_row)
        before = et.token_shift(hidden, state[HIDDEN], *last)
        if not draft_tokens:
            self.mtp.fill(self.embed_tokens(tokens.view(-1)), before, places, state)
            return self.draw(x, tokens, places, drawing, full_logits)
        drawn = et.sample(self.logits(x), *drawing, positions)
        accepted = _count_accepted(tokens, drawn, num_tokens)
        step = [accepted, _row_of_each(drawn.split(1, 1), accepted)]
        # The row in front comes first once more: the call before may have had another token there.
        front, _ = tokens.split((1, draft_tokens), 1)
        rows = (-1, 1 + draft_tokens, self.config.hidden_size)
        before, _ = before.view(rows).split((1, draft_tokens), 1)
        given = torch.cat((before, hidden.view(rows)), 1)
        # Rows of drafts that were refused are padding. The padding of a batch has no rows at all.
        is_there, accepted = (num_tokens > 0).long(), accepted.view(-1)
        places = Places(positions, slots, pages, is_there * (accepted + 2), None, True)
        behind, position = torch.cat((front, drawn), 1), positions + accepted + 1
        states, logits = self.draft(given, behind, places, state, 1, accepted)
        step.append(et.sample(logits, *drawing, position))
        for _ in range(1, draft_tokens):
            position = position + 1
            places = Places(position, slots, pages, is_there)
            states, logits = self.draft(states, step[-1], places, state, 1)
            step.append(et.sample(logits, *drawing, position))
        return (torch.cat(step, 1),)


def _count_accepted(tokens: Tensor, drawn: Tensor, num_tokens: Tensor) -> Tensor:
    """Of each sequence the number of rows, `int64 [B, 1]`, up to the first whose token is not what
    the row before drew, the first row apart. Args: as in `Qwen3_5MoeMtp.forward`; drawn like
    tokens."""
    is_next, total = None, None
    fed = zip(tokens.split(1, 1)[1:], drawn.split(1, 1), strict=False)
    for r, (token, expected) in enumerate(fed, 1):
        is_right = (token == expected).long() * (num_tokens.view(-1, 1) > r).long()
        is_next = is_right if is_next is None else is_next * is_right
        total = is_next if total is None else total + is_next
    return total


def _row_of_each(rows: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of each sequence the row that `index`, `int64 [B, 1]`, names; rows `[B, N]` each. What the
    others hold, padding perhaps, does not matter."""
    chosen, *others = rows
    for r, row in enumerate(others, 1):
        chosen = torch.where(index > r - 1, row, chosen)
    return chosen


def build(c: ModelConfig, p: Precision, layer: type[DecoderLayer]) -> Graph:
    """The model's graph, with the MTP head where the configuration has one."""
    return (Qwen3_5MoeMtp if c.mtp_num_hidden_layers else Qwen3_5Moe)(c, p, layer)
