"""Qwen3-Next as a graph: Qwen3.5's, with its own router and with layers that are not mixtures."""

from torch import Tensor, nn

from et_moe.examples.qwen3_5_moe.graph import DecoderLayer, SparseMoe
from et_moe.examples.qwen3_next.config import ModelConfig
from et_moe.pipeline.layers import GatedMlp
from et_moe.pipeline.storage import Precision


class DenseMlp(GatedMlp):
    """The MLP of a layer that is no mixture, called as `SparseMoe` is."""

    def __init__(self, c: ModelConfig, name: str, p: Precision) -> None:
        super().__init__(name, "dense_mlp", c.hidden_size, c.intermediate_size, c.rms_norm_eps, p)

    def forward(self, x: Tensor, norm: Tensor, num_tokens: Tensor | None) -> Tensor:
        return super().forward(x, x, norm)


class Qwen3NextLayer(DecoderLayer):
    """A decoder layer whose MLP is dense where the configuration says so."""

    def make_mlp(self, c: ModelConfig, index: int, name: str, p: Precision) -> nn.Module:
        if not c.is_sparse(index):
            return DenseMlp(c, name, p)
        return SparseMoe(c, name, p, normalize=c.norm_topk_prob)
