"""Qwen3-Next as a graph: Qwen3.5's, with its own router and with layers that are not mixtures."""

from torch import Tensor, nn

from et_moe.examples.qwen3_5_moe.graph import DecoderLayer, SparseMoe
from et_moe.examples.qwen3_next.config import ModelConfig
from et_moe.pipeline.layers import Linear
from et_moe.pipeline.storage import Precision


class DenseMlp(nn.Module):
    """down(silu(gate) * up), every column for every token."""

    def __init__(self, c: ModelConfig, name: str, p: Precision) -> None:
        super().__init__()
        h, i, eps = c.hidden_size, c.intermediate_size, c.rms_norm_eps
        self.gate_up_proj = Linear(f"{name}.gate_up_proj", "dense_mlp", h, 2 * i, eps, p)
        self.down_proj = Linear(f"{name}.down_proj", "dense_mlp", i, h, eps, p)

    def forward(self, x: Tensor, norm: Tensor, num_tokens: Tensor | None) -> Tensor:
        gate, up = self.gate_up_proj(x, norm).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up, residual=x)


class Qwen3NextLayer(DecoderLayer):
    """A decoder layer whose MLP is dense where the configuration says so."""

    def make_mlp(self, c: ModelConfig, index: int, name: str, p: Precision) -> nn.Module:
        if not c.is_sparse(index):
            return DenseMlp(c, name, p)
        return SparseMoe(c, name, p, normalize=c.norm_topk_prob)
