"""Qwen3.5 MoE as a graph of `et_moe` ops.

One sequence, no batch dimension. Parameters carry the names of a bundle; the state (KV cache,
convolution and recurrent state) is passed in and updated in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from et_moe.backends import ops
from et_moe.pipeline.config import ModelConfig

et = torch.ops.et_moe

State = dict[str, Tensor]


@dataclass(frozen=True)
class Quantization:
    """How weights and activations are stored; the choices of the command line.

    Args:
        qlinear: "4w" for INT4 linear layers and experts, "none" to keep them as they are.
        group_size: weights per INT4 scale.
        qembedding: "8w" for an INT8 embedding with a scale per row, or "none".
        moe_activation_dtype: "int8" quantizes activations in front of INT4 weights, "bf16" leaves
            them in the model's dtype.
    """

    qlinear: str = "4w"
    group_size: int = 128
    qembedding: str = "8w"
    moe_activation_dtype: str = "int8"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("qlinear", self.qlinear, ("none", "4w")),
            ("qlinear group size", self.group_size, ops.GROUP_SIZES),
            ("qembedding", self.qembedding, ("none", "8w")),
            ("MoE activation dtype", self.moe_activation_dtype, ("int8", "bf16")),
        ):
            if value not in allowed or type(value) is not type(allowed[0]):
                raise ValueError(f"{name} {value!r}: expected one of {allowed}")


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _w4_parameters(q: Quantization, name: str, *shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    *rows, k = shape
    if k % q.group_size:
        raise ValueError(f"group size {q.group_size} does not divide the {k} inputs of {name}")
    return (
        _parameter(*rows, k // 2, dtype=torch.uint8),
        _parameter(*rows, k // q.group_size, dtype=torch.bfloat16),
    )


class Linear(nn.Module):
    """A projection; `norm` is the RMSNorm in front, `residual` is added behind."""

    def __init__(
        self, name: str, k: int, n: int, eps: float, q: Quantization, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps, self.q = eps, q
        if q.qlinear == "4w":
            self.weight, self.scale = _w4_parameters(q, name, n, k)
        else:
            self.weight = _parameter(n, k, dtype=dtype)

    def forward(
        self, x: Tensor, norm: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if self.q.qlinear == "none":
            return et.linear(x, self.weight, norm, self.eps, residual)
        op = et.linear_w4a8 if self.q.moe_activation_dtype == "int8" else et.linear_w4a16
        return op(x, self.weight, self.scale, self.q.group_size, norm, self.eps, residual)


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.quantized = dtype, q.qembedding == "8w"
        if self.quantized:
            self.weight = _parameter(rows, width, dtype=torch.int8)
            self.scale = _parameter(rows, 1, dtype=torch.bfloat16)
        else:
            self.weight = _parameter(rows, width, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if self.quantized:
            return et.embedding_w8(ids, self.weight, self.scale, self.dtype)
        return nn.functional.embedding(ids, self.weight)


class Weight(nn.Module):
    """Holds the weight of a norm, convolution or router; the op that uses it gets it passed."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(*shape, dtype=dtype)


class GatedDeltaNet(nn.Module):
    """Linear attention: fused input projection [q | k | v | z | b | a], delta rule, projection."""

    def __init__(self, c: ModelConfig, name: str, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.eps = name, c.rms_norm_eps
        heads, values = c.linear_num_value_heads, c.linear_value_width
        inputs = c.conv_channels + values + 2 * heads
        self.in_proj = Linear(f"{name}.in_proj", c.hidden_size, inputs, self.eps, q, dtype)
        self.conv1d = Weight(c.conv_channels, c.linear_conv_kernel_dim, dtype=dtype)
        self.A_log = _parameter(heads, dtype=torch.float32)
        self.dt_bias = _parameter(heads, dtype=torch.float32)
        self.norm = Weight(c.linear_value_head_dim, dtype=dtype)
        self.out_proj = Linear(f"{name}.out_proj", values, c.hidden_size, self.eps, q, dtype)

    def forward(
        self, x: Tensor, norm: Tensor, position: Tensor, num_tokens: Tensor | None, state: State
    ) -> Tensor:
        core = et.gated_delta_net(
            self.in_proj(x, norm),
            self.conv1d.weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            state[f"{self.name}.conv_state"],
            state[f"{self.name}.recurrent_state"],
            self.eps,
            num_tokens,
        )
        return self.out_proj(core, residual=x)


class Attention(nn.Module):
    """Full attention: fused projection [(q | gate) per head | k | v], cache, projection."""

    def __init__(self, c: ModelConfig, name: str, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.eps = name, c.rms_norm_eps
        queries = c.num_attention_heads * c.head_dim
        outputs = 2 * queries + 2 * c.num_key_value_heads * c.head_dim
        self.qkv_proj = Linear(f"{name}.qkv_proj", c.hidden_size, outputs, self.eps, q, dtype)
        self.q_norm, self.k_norm = Weight(c.head_dim, dtype=dtype), Weight(c.head_dim, dtype=dtype)
        self.o_proj = Linear(f"{name}.o_proj", queries, c.hidden_size, self.eps, q, dtype)
        self.inv_freq = _parameter(c.rotary_dim // 2, dtype=torch.float32)

    def forward(
        self, x: Tensor, norm: Tensor, position: Tensor, num_tokens: Tensor | None, state: State
    ) -> Tensor:
        core = et.attention(
            self.qkv_proj(x, norm),
            self.q_norm.weight,
            self.k_norm.weight,
            self.inv_freq,
            state[f"{self.name}.k_cache"],
            state[f"{self.name}.v_cache"],
            position,
            self.eps,
            num_tokens,
        )
        return self.o_proj(core, residual=x)


class Experts(nn.Module):
    """Expert tables; the shared expert fills the last `shared_experts` slots."""

    def __init__(self, c: ModelConfig, name: str, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = q
        slots, h, i = c.num_experts + c.shared_experts, c.hidden_size, c.moe_intermediate_size
        if q.qlinear == "4w":
            self.w13, self.w13_scale = _w4_parameters(q, f"{name}.w13", slots, 2 * i, h)
            self.w2, self.w2_scale = _w4_parameters(q, f"{name}.w2", slots, h, i)
        else:
            self.w13 = _parameter(slots, 2 * i, h, dtype=dtype)
            self.w2 = _parameter(slots, h, i, dtype=dtype)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
        if self.q.qlinear == "none":
            return et.moe(x, self.w13, self.w2, weights, ids, residual)
        op = et.moe_w4a8 if self.q.moe_activation_dtype == "int8" else et.moe_w4a16
        packed = (self.w13, self.w13_scale, self.w2, self.w2_scale)
        return op(x, *packed, weights, ids, self.q.group_size, residual)


class SparseMoe(nn.Module):
    def __init__(self, c: ModelConfig, name: str, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k, self.shared, self.eps = c.num_experts_per_tok, c.shared_experts, c.rms_norm_eps
        # Rows of the router, and last the shared expert's gate.
        self.gate = Weight(c.num_experts + 1, c.hidden_size, dtype=dtype)
        self.experts = Experts(c, f"{name}.experts", q, dtype)

    def forward(self, x: Tensor, norm: Tensor, num_tokens: Tensor | None) -> Tensor:
        normed, weights, ids = et.moe_router(
            x, norm, self.gate.weight, self.top_k, self.shared, self.eps, num_tokens
        )
        return self.experts(normed, weights, ids, residual=x)


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig, index: int, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.input_layernorm = Weight(c.hidden_size, dtype=dtype)
        if c.layer_types[index] == "linear_attention":
            self.linear_attn = GatedDeltaNet(c, f"{name}.linear_attn", q, dtype)
        else:
            self.self_attn = Attention(c, f"{name}.self_attn", q, dtype)
        self.post_attention_layernorm = Weight(c.hidden_size, dtype=dtype)
        self.mlp = SparseMoe(c, f"{name}.mlp", q, dtype)

    def forward(
        self, x: Tensor, position: Tensor, num_tokens: Tensor | None, state: State
    ) -> Tensor:
        mixer = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        x = mixer(x, self.input_layernorm.weight, position, num_tokens, state)
        return self.mlp(x, self.post_attention_layernorm.weight, num_tokens)


class Qwen3_5Moe(nn.Module):
    """The text model with its head and sampler.

    Args:
        c: the shape.
        q: how weights are stored.
        dtype: float32 or bfloat16, of activations, caches and weights that are not quantized.
    """

    def __init__(self, c: ModelConfig, q: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = c, dtype
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, q, dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(c, i, q, dtype) for i in range(c.num_hidden_layers)
        )
        self.norm = Weight(c.hidden_size, dtype=dtype)
        self.lm_head = Linear("lm_head", c.hidden_size, c.vocab_size, c.rms_norm_eps, q, dtype)

    def state_spec(self, max_seq_len: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every state tensor; a session starts with zeros."""
        c, spec = self.config, {}
        heads = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        for i, kind in enumerate(c.layer_types):
            if kind == "linear_attention":
                name = f"layers.{i}.linear_attn"
                conv = (c.linear_conv_kernel_dim - 1, c.conv_channels)
                spec[f"{name}.conv_state"] = (self.dtype, conv)
                spec[f"{name}.recurrent_state"] = (torch.float32, heads)
            else:
                cache = (c.num_key_value_heads, max_seq_len, c.head_dim)
                spec[f"layers.{i}.self_attn.k_cache"] = (self.dtype, cache)
                spec[f"layers.{i}.self_attn.v_cache"] = (self.dtype, cache)
        return spec

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        num_tokens: Tensor | None,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
        state: State,
    ) -> tuple[Tensor, Tensor]:
        """Consumes tokens and draws the next one.

        Args:
            tokens: `int64 [1, T]`. position: `int64 [1]`, of the first of them.
            num_tokens: `int64 [1]`, how many are valid (the rest is padding), or None if T is 1.
            temperature, top_k, top_p, seed: as in `ops.sample`.
            state: tensors of `state_spec`, updated in place.

        Returns:
            The next token `int64 [1, 1]` and its logits `float32 [1, V]`.
        """
        x = self.embed_tokens(tokens.view(-1))
        for layer in self.layers:
            x = layer(x, position, num_tokens, state)
        last = x if num_tokens is None else x.index_select(0, num_tokens - 1)
        # One row: fp32 here keeps logits from being rounded to bfloat16.
        logits = self.lm_head(last.float(), norm=self.norm.weight)
        if num_tokens is not None:
            position = position + (num_tokens - 1)
        token = et.sample(logits, temperature, top_k, top_p, seed, position)
        return token, logits
