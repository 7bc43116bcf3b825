"""The tensors of a checkpoint: their names and shapes, and how they make up the parameters.

The fused parameters are: `in_proj` [qkv | z | b | a] and `qkv_proj` [q | k | v] by rows, `mlp.gate`
with the shared expert's gate as last row, and the tables of experts `w13` [gate | up] and `w2`, in
which the shared expert fills the last slots, unless it has a `gate_up_proj` and a `down_proj` of
its own. The MTP head's `fc` becomes two matrices: the columns that take the embedding, and those
that take the hidden state.
"""

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.models import MTP, Parts, Random, Shapes, join

Read = Callable[[str], Tensor]
"""Reads a tensor of the checkpoint by its name behind the prefix."""


def linear_attention_shapes(c: ModelConfig) -> Shapes:
    """Tensors of a gated delta net, by their names in the layer's `linear_attn`."""
    h, heads, values = c.hidden_size, c.linear_num_value_heads, c.linear_value_width
    return {
        "in_proj_qkv.weight": (c.conv_channels, h),
        "in_proj_z.weight": (values, h),
        "in_proj_b.weight": (heads, h),
        "in_proj_a.weight": (heads, h),
    } | linear_attention_core_shapes(c)


def linear_attention_core_shapes(c: ModelConfig) -> Shapes:
    """The same without its input projections."""
    heads, values = c.linear_num_value_heads, c.linear_value_width
    return {
        "conv1d.weight": (c.conv_channels, 1, c.linear_conv_kernel_dim),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (c.linear_value_head_dim,),
        "out_proj.weight": (c.hidden_size, values),
    }


def _self_attention_shapes(c: ModelConfig) -> Shapes:
    h, queries, keys = (
        c.hidden_size,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    return {
        "q_proj.weight": (2 * queries, h),
        "k_proj.weight": (keys, h),
        "v_proj.weight": (keys, h),
        "o_proj.weight": (h, queries),
        "q_norm.weight": (c.head_dim,),
        "k_norm.weight": (c.head_dim,),
    }


def sparse_moe_shapes(c: ModelConfig, fused_experts: bool) -> Shapes:
    """Tensors of a mixture of experts, by their names in the layer's `mlp`."""
    h, i, shared = c.hidden_size, c.moe_intermediate_size, c.shared_expert_intermediate_size
    shapes: Shapes = {
        "gate.weight": (c.num_experts, h),
        "shared_expert_gate.weight": (1, h),
        "shared_expert.gate_proj.weight": (shared, h),
        "shared_expert.up_proj.weight": (shared, h),
        "shared_expert.down_proj.weight": (h, shared),
    }
    if fused_experts:
        return shapes | {
            "experts.gate_up_proj": (c.num_experts, 2 * i, h),
            "experts.down_proj": (c.num_experts, h, i),
        }
    for e in range(c.num_experts):
        shapes[f"experts.{e}.gate_proj.weight"] = (i, h)
        shapes[f"experts.{e}.up_proj.weight"] = (i, h)
        shapes[f"experts.{e}.down_proj.weight"] = (h, i)
    return shapes


HEAD = "lm_head.weight"

MTP_NORMS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
MTP_LAYER = f"{MTP}layers.0"
"""The decoder layer of the MTP head."""

PARTS = {
    ".mlp.experts.": "experts",
    ".mlp.shared_expert.": "shared_expert",
    ".linear_attn.in_proj": "linear_attention",
    ".linear_attn.out_proj.": "linear_attention",
    ".self_attn.q_proj.": "attention",
    ".self_attn.k_proj.": "attention",
    ".self_attn.v_proj.": "attention",
    ".self_attn.o_proj.": "attention",
    f"{MTP}fc.": "attention",
}
"""What names of weights in layers and the MTP head have in them -> the part of the model."""


def are_fused(names: Collection[str], mtp: bool = False) -> bool:
    """Whether a checkpoint with these tensors has one table of all experts in a layer of the model,
    or in the MTP head's, which may differ; so it is assumed where there are no names."""
    fused = "mlp.experts.gate_up_proj"
    return not names or any(n.endswith(fused) and n.startswith(MTP) == mtp for n in names)


def has_head(c: ModelConfig, names: Collection[str]) -> bool:
    """Whether a checkpoint with these tensors has a head of its own. One that is there counts
    whatever `tie_word_embeddings` says, as in Hugging Face's models, which do not tie what
    differs."""
    return HEAD in names or not c.tie_word_embeddings


class Tensors:
    """The tensors of Qwen3.5's checkpoints; a model that differs in a layer overrides its part."""

    def shapes(self, c: ModelConfig, names: Collection[str]) -> Shapes:
        """Every text tensor of a checkpoint, by its name after the prefix; `names` are those
        found, none for a checkpoint that is yet to be made."""
        h, fused_experts = c.hidden_size, are_fused(names)
        shapes: Shapes = {"embed_tokens.weight": (c.vocab_size, h), "norm.weight": (h,)}
        if has_head(c, names):
            shapes[HEAD] = (c.vocab_size, h)
        for layer in range(c.num_hidden_layers):
            shapes |= self._layer_shapes(c, layer, f"layers.{layer}", fused_experts)
        if c.mtp_num_hidden_layers:
            fused_experts = are_fused(names, mtp=True)
            shapes[f"{MTP}fc.weight"] = (h, 2 * h)
            shapes |= {f"{MTP}{norm}.weight": (h,) for norm in MTP_NORMS}
            shapes |= self._layer_shapes(c, c.num_hidden_layers, MTP_LAYER, fused_experts)
        return shapes

    def _layer_shapes(self, c: ModelConfig, layer: int, name: str, fused_experts: bool) -> Shapes:
        """Tensors of a decoder layer that is called `name`."""
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes: Shapes = {f"{name}.{norm}.weight": (c.hidden_size,) for norm in norms}
        if c.layer_type(layer) == "linear_attention":
            mixer, inside = "linear_attn", self.linear_attention_shapes(c)
        else:
            mixer, inside = "self_attn", _self_attention_shapes(c)
        shapes |= {f"{name}.{mixer}.{n}": s for n, s in inside.items()}
        inside = self.mlp_shapes(c, layer, fused_experts)
        return shapes | {f"{name}.mlp.{n}": s for n, s in inside.items()}

    def part(self, name: str) -> str | None:
        """See `pipeline.models.Model`."""
        if name in (HEAD, "embed_tokens.weight"):
            return "head" if name == HEAD else "embedding"
        return next((part for inside, part in PARTS.items() if inside in name), None)

    def linear_attention_shapes(self, c: ModelConfig) -> Shapes:
        """Tensors of a gated delta net, by their names in `linear_attn`."""
        return linear_attention_shapes(c)

    def mlp_shapes(self, c: ModelConfig, layer: int, fused_experts: bool) -> Shapes:
        """Tensors of a layer's MLP, by their names in `mlp`."""
        return sparse_moe_shapes(c, fused_experts)

    def groups(
        self, c: ModelConfig, names: Collection[str], read: Read, joined: bool
    ) -> Iterator[dict[str, Parts]]:
        """The parameters of the graph, group by group; see `pipeline.models.Model`. `joined` says
        whether the shared expert is in the tables of the others."""
        fused_experts = are_fused(names)  # goes through all names
        yield {"embed_tokens.weight": [read("embed_tokens.weight")]}
        for layer in range(c.num_hidden_layers):
            yield self._layer(c, layer, f"layers.{layer}", fused_experts, read, joined)
        head = HEAD if has_head(c, names) else "embed_tokens.weight"
        yield {"norm.weight": [read("norm.weight")], HEAD: [read(head)]}
        if c.mtp_num_hidden_layers:
            yield self._mtp(c, are_fused(names, mtp=True), read, joined)

    def _mtp(
        self, c: ModelConfig, fused_experts: bool, read: Read, joined: bool
    ) -> dict[str, Parts]:
        fc = read(f"{MTP}fc.weight")
        group = {f"{MTP}{norm}.weight": [read(f"{MTP}{norm}.weight")] for norm in MTP_NORMS}
        for name, columns in zip(("fc_embedding", "fc_hidden"), fc.chunk(2, dim=1), strict=True):
            group[f"{MTP}{name}.weight"] = [columns]
        layer = c.num_hidden_layers
        return group | self._layer(c, layer, MTP_LAYER, fused_experts, read, joined)

    def _layer(
        self,
        c: ModelConfig,
        layer: int,
        name: str,
        fused_experts: bool,
        read: Read,
        joined: bool,
    ) -> dict[str, Parts]:
        """The parameters of a decoder layer that is called `name`."""

        def inside(tensor: str) -> Tensor:
            return read(f"{name}.{tensor}")

        group = {"input_layernorm.weight": [inside("input_layernorm.weight")]}
        if c.layer_type(layer) == "linear_attention":
            group |= self._linear_attention(c, lambda n: inside(f"linear_attn.{n}"))
        else:
            group |= _self_attention(c, lambda n: inside(f"self_attn.{n}"))
        group["post_attention_layernorm.weight"] = [inside("post_attention_layernorm.weight")]
        mlp = self.mlp_parts(c, layer, fused_experts, lambda n: inside(f"mlp.{n}"), joined)
        group |= {f"mlp.{tensor}": parts for tensor, parts in mlp.items()}
        return {f"{name}.{tensor}": parts for tensor, parts in group.items()}

    def _linear_attention(self, c: ModelConfig, read: Read) -> dict[str, Parts]:
        parts = {
            "in_proj.weight": self.in_proj_parts(c, read),
            "conv1d.weight": [read("conv1d.weight").squeeze(1)],
            "A_log": [read("A_log")],
            "dt_bias": [read("dt_bias")],
            "norm.weight": [read("norm.weight")],
            "out_proj.weight": [read("out_proj.weight")],
        }
        return {f"linear_attn.{name}": tensors for name, tensors in parts.items()}

    def in_proj_parts(self, c: ModelConfig, read: Read) -> Parts:
        """The rows of the fused input projection, [q | k | v | z | b | a]."""
        return [read(f"in_proj_{p}.weight") for p in ("qkv", "z", "b", "a")]

    def mlp_parts(
        self, c: ModelConfig, layer: int, fused_experts: bool, read: Read, joined: bool
    ) -> dict[str, Parts]:
        """The parameters of a layer's MLP, by their names in `mlp`."""
        parts = {
            "gate.weight": [read("gate.weight"), read("shared_expert_gate.weight")],
            "experts.w13": _experts(c, fused_experts, read, "gate", "up"),
            "experts.w2": _experts(c, fused_experts, read, "down"),
        }
        if joined:
            parts["experts.w13"].append(_shared_w13(c, read))
            parts["experts.w2"].append(_shared_w2(c, read))
            return parts
        shared = {p: read(f"shared_expert.{p}_proj.weight") for p in ("gate", "up", "down")}
        return parts | {
            "shared_expert.gate_up_proj.weight": [shared["gate"], shared["up"]],
            "shared_expert.down_proj.weight": [shared["down"]],
        }


def _self_attention(c: ModelConfig, read: Read) -> dict[str, Parts]:
    parts = {
        "qkv_proj.weight": [read(f"{p}_proj.weight") for p in "qkv"],
        "q_norm.weight": [_rotary_norm(c, read("q_norm.weight"))],
        "k_norm.weight": [_rotary_norm(c, read("k_norm.weight"))],
        "o_proj.weight": [read("o_proj.weight")],
        "inv_freq": [inverse_frequencies(c)],
    }
    return {f"self_attn.{name}": tensors for name, tensors in parts.items()}


def _experts(c: ModelConfig, fused_experts: bool, read: Read, *projections: str) -> Parts:
    """The routed experts' `[E, rows, columns]` of one or two projections, one below the other."""
    if fused_experts:
        return [read(f"experts.{'_'.join(projections)}_proj")]
    return [
        join([read(f"experts.{e}.{p}_proj.weight") for p in projections])[None]
        for e in range(c.num_experts)
    ]


def _shared_w13(c: ModelConfig, read: Read) -> Tensor:
    """The shared expert as further experts of the routed width, the last one zero-padded."""
    width, slots = c.moe_intermediate_size, c.shared_experts
    halves = []
    for p in ("gate", "up"):
        half = read(f"shared_expert.{p}_proj.weight")
        padding = half.new_zeros(slots * width - half.shape[0], half.shape[1])
        halves.append(join((half, padding)).view(slots, width, -1))
    return join(halves, dim=1)


def _shared_w2(c: ModelConfig, read: Read) -> Tensor:
    width, slots = c.moe_intermediate_size, c.shared_experts
    down = read("shared_expert.down_proj.weight")
    padding = down.new_zeros(down.shape[0], slots * width - down.shape[1])
    return join((down, padding), dim=1).view(-1, slots, width).transpose(0, 1)


def inverse_frequencies(c: ModelConfig) -> Tensor:
    """RoPE's theta^(-2i/R), or YaRN's mixture of them and the stretched ones, `float32 [R/2]`, in
    Hugging Face's order of operations (`modeling_rope_utils.py`)."""
    exponent = torch.arange(0, c.rotary_dim, 2, dtype=torch.int64).float() / c.rotary_dim
    periods = c.rope_theta**exponent
    if c.yarn is None:
        return 1.0 / periods
    low, high = _yarn_borders(c)
    dimension = torch.arange(c.rotary_dim // 2, dtype=torch.float32)
    kept = 1 - ((dimension - low) / (high - low)).clamp(0, 1)
    return 1.0 / (c.yarn.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_borders(c: ModelConfig) -> tuple[float, float]:
    """The dimensions between which frequencies pass from kept to stretched."""

    def dimension(turns: float) -> float:
        length = c.yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return c.rotary_dim * math.log(length) / (2 * math.log(c.rope_theta))

    low, high = dimension(c.yarn.beta_fast), dimension(c.yarn.beta_slow)
    if c.yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.rotary_dim - 1)
    return low, high + 0.001 if low == high else high


def _rotary_norm(c: ModelConfig, weight: Tensor) -> Tensor:
    """The norm of queries or keys with YaRN's attention factor in it.

    Hugging Face multiplies cos and sin by the factor, hence the columns that are rotated, which
    come out of the norm multiplied by 1 + weight.
    """
    if c.yarn is None or c.yarn.attention_factor == 1:
        return weight
    scaled = weight.float().clone()
    rotated = scaled[: c.rotary_dim]
    rotated.copy_((1 + rotated) * c.yarn.attention_factor - 1)
    return scaled


def random_values(name: str, shape: tuple[int, ...], std: float) -> Random:
    """How a random checkpoint draws a tensor: as transformers' `_init_weights` of
    modeling_qwen3_5_moe.py does, but norms a little off their neutral value.

    Args:
        std: of weights that have no rule of their own (`initializer_range`).
    """
    if name.endswith(".A_log"):
        return Random(log_uniform=(0.01, 16.0))
    if name.endswith(".dt_bias"):
        return Random(mean=1.0, std=0.0)
    if name.endswith("linear_attn.norm.weight"):
        return Random(mean=1.0, std=0.05)
    if name.endswith("norm.weight") or ".pre_fc_norm_" in name:
        # Zero-centred: the layer multiplies by 1 + weight.
        return Random(std=0.05)
    if name.endswith(".conv1d.weight"):  # keeps the scale of its input, as trained ones do
        return Random(std=shape[-1] ** -0.5)
    return Random(std=std)
