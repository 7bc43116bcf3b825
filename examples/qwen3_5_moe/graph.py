"""Qwen3.5 MoE as a graph of `et_moe` ops.

Rows belong to sequences, see `backends/ops/sequences.py`. Parameters carry the names of a bundle;
the state (KV cache, convolution and recurrent state) is passed in and updated in place. A model
that differs in a layer overrides the method of `DecoderLayer` that makes it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from et_moe.backends.method_graph import PAGES, SLOTS
from et_moe.backends.ops import PAGE_SIZE
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.layers import Embedding, Experts, GatedMlp, Linear, Weight, parameter
from et_moe.pipeline.models import Graph, StateTensor
from et_moe.pipeline.storage import Precision, Storages

et = torch.ops.et_moe

State = dict[str, Tensor]


class Places(NamedTuple):
    """Where the rows of a call belong.

    Attributes:
        positions: `int64 [B]`, of each sequence's first row.
        slots: `int32 [B]`. pages: `int32 [B, M]`.
        num_tokens: `int64 [B]`, or None if all rows are valid.
        versions: `int64 [B]`, of the states in the slots, or None if there is one of each.
        each_row: whether a row has the bits that it has alone, and leaves a version.
    """

    positions: Tensor
    slots: Tensor
    pages: Tensor
    num_tokens: Tensor | None
    versions: Tensor | None = None
    each_row: bool = False


class GatedDeltaNet(nn.Module):
    """Linear attention: fused input projection [q | k | v | z | b | a], delta rule, projection."""

    def __init__(self, c: ModelConfig, name: str, p: Precision) -> None:
        super().__init__()
        self.name, self.eps, part = name, c.rms_norm_eps, "linear_attention"
        heads, values = c.linear_num_value_heads, c.linear_value_width
        inputs = c.conv_channels + values + 2 * heads
        self.in_proj = Linear(f"{name}.in_proj", part, c.hidden_size, inputs, self.eps, p)
        self.conv1d = Weight(c.conv_channels, c.linear_conv_kernel_dim, dtype=p.dtype)
        self.A_log = parameter(heads, dtype=torch.float32)
        self.dt_bias = parameter(heads, dtype=torch.float32)
        self.norm = Weight(c.linear_value_head_dim, dtype=p.dtype)
        self.out_proj = Linear(f"{name}.out_proj", part, values, c.hidden_size, self.eps, p)

    def forward(self, x: Tensor, norm: Tensor, places: Places, state: State) -> Tensor:
        core = et.gated_delta_net(
            self.in_proj(x, norm),
            self.conv1d.weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            state[f"{self.name}.conv_state"],
            state[f"{self.name}.recurrent_state"],
            places.slots,
            self.eps,
            places.num_tokens,
            places.versions,
            places.each_row,
        )
        return self.out_proj(core, residual=x)


class Attention(nn.Module):
    """Full attention: fused projection [(q | gate) per head | k | v], cache, projection."""

    def __init__(self, c: ModelConfig, name: str, p: Precision) -> None:
        super().__init__()
        self.name, self.eps, part = name, c.rms_norm_eps, "attention"
        queries = c.num_attention_heads * c.head_dim
        outputs = 2 * queries + 2 * c.num_key_value_heads * c.head_dim
        self.qkv_proj = Linear(f"{name}.qkv_proj", part, c.hidden_size, outputs, self.eps, p)
        self.q_norm, self.k_norm = (
            Weight(c.head_dim, dtype=p.dtype),
            Weight(c.head_dim, dtype=p.dtype),
        )
        self.o_proj = Linear(f"{name}.o_proj", part, queries, c.hidden_size, self.eps, p)
        self.inv_freq = parameter(c.rotary_dim // 2, dtype=torch.float32)

    def forward(self, x: Tensor, norm: Tensor, places: Places, state: State) -> Tensor:
        return self.o_proj(self.attend(x, norm, places, state), residual=x)

    def attend(
        self, x: Tensor, norm: Tensor, places: Places, state: State, first_token: int = 0
    ) -> Tensor:
        """What the output projection takes, `[B R, Hq D]`; see `ops.attention`."""
        return et.attention(
            self.qkv_proj(x, norm),
            self.q_norm.weight,
            self.k_norm.weight,
            self.inv_freq,
            state[f"{self.name}.k_cache"],
            state[f"{self.name}.v_cache"],
            places.pages,
            places.positions,
            self.eps,
            places.num_tokens,
            first_token,
            places.each_row,
        )


def is_joined(storages: Storages) -> bool:
    """Whether the shared expert fills the last slots of the experts' tables."""
    return storages["shared_expert"] == storages["experts"]


class SparseMoe(nn.Module):
    """A mixture of experts. The shared expert fills the last slots of the tables if it is stored
    as the others are; else it is an MLP of its own.

    Args:
        normalize: whether the chosen experts' weights are made to add up to 1.
    """

    def __init__(self, c: ModelConfig, name: str, p: Precision, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.top_k, self.eps = c.num_experts_per_tok, c.rms_norm_eps
        self.joined = is_joined(p.storages)
        shared = c.shared_experts if self.joined else 0
        # Of the router's results: a column of gates is all that a shared expert apart needs.
        self.shared = max(shared, 1)
        # Rows of the router, and last the shared expert's gate.
        self.gate = Weight(c.num_experts + 1, c.hidden_size, dtype=p.dtype)
        counts = c.num_experts + shared, self.top_k + shared
        self.experts = Experts(
            f"{name}.experts", "experts", *counts, c.hidden_size, c.moe_intermediate_size, p
        )
        if not self.joined:
            sizes = c.hidden_size, c.shared_expert_intermediate_size, self.eps, p
            self.shared_expert = GatedMlp(f"{name}.shared_expert", "shared_expert", *sizes)

    def forward(self, x: Tensor, norm: Tensor, num_tokens: Tensor | None) -> Tensor:
        normed, weights, ids = et.moe_router(
            x,
            norm,
            self.gate.weight,
            self.top_k,
            self.shared,
            self.eps,
            num_tokens,
            self.normalize,
        )
        if not self.joined:
            # Its slot is outside of the tables, where the experts skip it.
            _, gate = weights.split((self.top_k, self.shared), dim=-1)
            x = self.shared_expert(normed, residual=x, scale=gate)
        return self.experts(normed, weights, ids, residual=x)


class DecoderLayer(nn.Module):
    """A mixer (linear or full attention) and an MLP, each with its norm in front and a residual.

    Args:
        index: of the layer in the model; see `ModelConfig.layer_type`.
        name: of the module in the graph; `layers.<index>` if none is given.
    """

    def __init__(self, c: ModelConfig, index: int, p: Precision, name: str | None = None) -> None:
        super().__init__()
        name = name or f"layers.{index}"
        self.input_layernorm = Weight(c.hidden_size, dtype=p.dtype)
        if c.layer_type(index) == "linear_attention":
            self.linear_attn = GatedDeltaNet(c, f"{name}.linear_attn", p)
        else:
            self.self_attn = Attention(c, f"{name}.self_attn", p)
        self.post_attention_layernorm = Weight(c.hidden_size, dtype=p.dtype)
        self.mlp = self.make_mlp(c, index, f"{name}.mlp", p)

    def make_mlp(self, c: ModelConfig, index: int, name: str, p: Precision) -> nn.Module:
        """The layer's MLP: a module called as `SparseMoe` is."""
        return SparseMoe(c, name, p)

    def forward(self, x: Tensor, places: Places, state: State) -> Tensor:
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        x = mixer(x, self.input_layernorm.weight, places, state)
        return self.mlp(x, self.post_attention_layernorm.weight, places.num_tokens)


class Qwen3_5Moe(Graph):
    """The text model with its head and sampler.

    Args:
        c: the shape.
        p: storages of the parts "embedding", "attention", "linear_attention", "experts",
            "shared_expert" and "head", and the dtypes.
        layer: makes decoder layers.
    """

    def __init__(
        self, c: ModelConfig, p: Precision, layer: type[DecoderLayer] = DecoderLayer
    ) -> None:
        super().__init__()
        self.config, self.dtype = c, p.dtype
        self.recurrent_state_dtype = p.recurrent_state_dtype
        vocabulary, hidden = c.vocab_size, c.hidden_size
        self.embed_tokens = Embedding("embed_tokens", "embedding", vocabulary, hidden, p)
        self.layers = nn.ModuleList(layer(c, i, p) for i in range(c.num_hidden_layers))
        self.norm = Weight(hidden, dtype=p.dtype)
        self.lm_head = Linear("lm_head", "head", hidden, vocabulary, c.rms_norm_eps, p)

    def state_spec(self, draft_tokens: int = 0) -> dict[str, StateTensor]:
        c, spec = self.config, {}
        heads = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        if draft_tokens:
            heads = (1 + draft_tokens, *heads)
        conv = (c.linear_conv_kernel_dim - 1 + draft_tokens, c.conv_channels)
        for i, kind in enumerate(c.layer_types):
            if kind == "linear_attention":
                name = f"layers.{i}.linear_attn"
                spec[f"{name}.conv_state"] = StateTensor(self.dtype, SLOTS, conv)
                spec[f"{name}.recurrent_state"] = StateTensor(
                    self.recurrent_state_dtype, SLOTS, heads
                )
            else:
                spec |= self.kv_cache(f"layers.{i}.self_attn")
        return spec

    def kv_cache(self, name: str) -> dict[str, StateTensor]:
        """The state of a full attention layer that is called `name`."""
        c = self.config
        cache = StateTensor(self.dtype, PAGES, (c.num_key_value_heads, PAGE_SIZE, c.head_dim))
        return {f"{name}.k_cache": cache, f"{name}.v_cache": cache}

    def hidden(self, tokens: Tensor, places: Places, state: State) -> Tensor:
        """What comes out of the last layer, before the final norm: `[B R, H]`; see `forward`."""
        x = self.embed_tokens(tokens.view(-1))
        for layer in self.layers:
            x = layer(x, places, state)
        return x

    def advance(self, group: int, x: Tensor, sequences: int, state: State) -> Tensor:
        if group == 0:
            return self.embed_tokens(x.flatten())
        if group > len(self.layers):
            return self.lm_head(x.float(), norm=self.norm.weight)
        each = -(-len(x) // (sequences * PAGE_SIZE))
        slots = torch.arange(sequences, dtype=torch.int32, device=x.device)
        pages = torch.arange(sequences * each, dtype=torch.int32, device=x.device)
        begin = torch.zeros_like(slots, dtype=torch.int64)
        return self.layers[group - 1](x, Places(begin, slots, pages.view(-1, each), None), state)

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
        full_logits: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Consumes tokens and draws the next one of each sequence.

        Args:
            tokens: `int64 [B, R]`; B or R is 1. positions: `int64 [B]`, of the first of each R.
            slots: `int32 [B]`. pages: `int32 [B, M]`.
            num_tokens: `int64 [B]`, how many are valid (the rest is padding), or None for R.
            temperature, top_k, top_p, seed: `[B]`, as in `ops.sample`.
            state: tensors of `state_spec`, updated in place.
            full_logits: whether the logits of all rows are wanted; of one sequence.

        Returns:
            The next tokens `int64 [B, 1]` and their logits `float32 [B, V]`; with `full_logits`
            those of the token behind each row, `float32 [R, V]`.
        """
        places = Places(positions, slots, pages, num_tokens)
        x = self.hidden(tokens, places, state)
        return self.draw(x, tokens, places, (temperature, top_k, top_p, seed), full_logits)

    def logits(self, x: Tensor) -> Tensor:
        """Of the token behind each row, `float32 [T, V]`, by what `hidden` returns."""
        # fp32 here keeps logits from being rounded to bfloat16.
        return self.lm_head(x.float(), norm=self.norm.weight)

    def draw(
        self,
        x: Tensor,
        tokens: Tensor,
        places: Places,
        drawing: tuple[Tensor, ...],
        full_logits: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, by what `hidden` does; `drawing` are the parameters of `sample`
        but for positions."""
        positions = places.positions
        if tokens.shape[1] == 1 or places.num_tokens is None:
            logits = self.logits(x)
            return et.sample(logits, *drawing, positions), logits
        last = places.num_tokens - 1
        if full_logits:
            logits = self.logits(x)
            of_last = logits.index_select(0, last)
        else:
            logits = of_last = self.logits(x.index_select(0, last))
        return et.sample(of_last, *drawing, positions + last), logits
