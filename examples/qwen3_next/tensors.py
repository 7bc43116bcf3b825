"""The tensors of a checkpoint of Qwen3-Next, where they differ from Qwen3.5's.

A gated delta net has two input projections whose rows are interleaved: `in_proj_qkvz` holds, key
head after key head, [q | k | v of its value heads | z of its value heads], and `in_proj_ba` holds
[b of its value heads | a of its value heads]. Here they are brought into Qwen3.5's order,
[q | k | v | z | b | a], each of all heads.
"""

from et_moe.examples.qwen3_5_moe.tensors import (
    Read,
    Tensors,
    linear_attention_core_shapes,
    sparse_moe_shapes,
)
from et_moe.examples.qwen3_next.config import ModelConfig
from et_moe.pipeline.models import Parts, Shapes, join

DENSE = ("gate_proj", "up_proj", "down_proj")


class Qwen3NextTensors(Tensors):
    """See `et_moe.examples.qwen3_5_moe.tensors.Tensors`."""

    def part(self, name: str) -> str | None:
        inside = any(f".mlp.{projection}." in name for projection in DENSE)
        return "dense_mlp" if inside else super().part(name)

    def linear_attention_shapes(self, c: ModelConfig) -> Shapes:
        h, heads = c.hidden_size, c.linear_num_value_heads
        return {
            "in_proj_qkvz.weight": (2 * c.linear_key_width + 2 * c.linear_value_width, h),
            "in_proj_ba.weight": (2 * heads, h),
        } | linear_attention_core_shapes(c)

    def in_proj_parts(self, c: ModelConfig, read: Read) -> Parts:
        key_heads = c.linear_num_key_heads
        ratio = c.linear_num_value_heads // key_heads
        key, value = c.linear_key_head_dim, ratio * c.linear_value_head_dim
        qkvz = read("in_proj_qkvz.weight").unflatten(0, (key_heads, -1))
        ba = read("in_proj_ba.weight").unflatten(0, (key_heads, -1))
        pieces = (*qkvz.split((key, key, value, value), dim=1), *ba.split((ratio, ratio), dim=1))
        return [piece.flatten(0, 1) for piece in pieces]

    def mlp_shapes(self, c: ModelConfig, layer: int, fused_experts: bool) -> Shapes:
        if c.is_sparse(layer):
            return sparse_moe_shapes(c, fused_experts)
        h, i = c.hidden_size, c.intermediate_size
        shapes = ((i, h), (i, h), (h, i))
        return {f"{name}.weight": shape for name, shape in zip(DENSE, shapes, strict=True)}

    def mlp_parts(
        self, c: ModelConfig, layer: int, fused_experts: bool, read: Read, joined: bool
    ) -> dict[str, Parts]:
        if c.is_sparse(layer):
            return super().mlp_parts(c, layer, fused_experts, read, joined)
        gate, up, down = (read(f"{name}.weight") for name in DENSE)
        return {"gate_up_proj.weight": [join((gate, up))], "down_proj.weight": [down]}
