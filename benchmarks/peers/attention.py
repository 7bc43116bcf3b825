"""The ExecuTorch wheel's own attention layer between its projections, compiled by torch.

The wheel's `sdpa` kernel only attends. What our `attention` does besides (QK-norm, RoPE, the
cache's update and the output gate) is left to torch's compiler in the wheel's example
(`executorch.examples.models.qwen3_5_moe.model.FullAttention`), which attends to the whole cache
with a mask.
"""

from types import ModuleType

import torch
from torch import nn

from et_moe.benchmarks.peers import executorch
from et_moe.examples.qwen3_5_moe.config import ModelConfig

TOKENS = (1, 2, 8, 64, 512, 1600)
"""Numbers of tokens that it is measured for. To compile and tune for each takes some seconds."""
COMPILER = {"options": {"autotune_local_cache": False}}
"""Options of torch.compile: what was tuned for another number of tokens is not used again."""


class ModuleAttention:
    """The layer without its projections: `qkv [m, 2 Hq D + 2 Hkv D]` to `[1, m, Hq D]`.

    The layout of qkv is that of `et_moe.backends.ops.attention`; caches are `[1, Hkv, S, D]`, and
    input_pos has the tokens' positions, `int64 [m]`. Caches are arguments, so that callers can
    rotate them. The layer is compiled anew whenever m is not that of the call before.
    """

    def __init__(
        self,
        um: ModuleType,
        c: ModelConfig,
        capacity: int,
        device: torch.device,
        compiled: bool = True,
    ) -> None:
        with torch.device("meta"):
            layer = um.FullAttention(executorch.model_config(um, c, capacity))
            layer = layer.to(torch.bfloat16)
            layer.qkv_proj, layer.o_proj = nn.Identity(), nn.Identity()
        self.layer = layer.to_empty(device=device).eval().requires_grad_(False)
        executorch.fill(um, self.layer, c)
        self._compiled, self._function, self._tokens = compiled, self._between, None

    def _between(self, qkv, input_pos, k_cache, v_cache):
        caches = {"kv_cache.k_cache": k_cache, "kv_cache.v_cache": v_cache}
        return torch.func.functional_call(self.layer, caches, (qkv[None], input_pos))

    def _compile(self) -> None:
        """Compiles from scratch: otherwise kernels that are alike would share a configuration."""
        torch.compiler.reset()
        torch._inductor.utils.clear_caches()
        self._function = torch.compile(self._between, dynamic=False, **COMPILER)

    def __call__(self, qkv, input_pos, k_cache, v_cache) -> torch.Tensor:
        if self._compiled and self._tokens != len(qkv):
            self._compile()
            self._tokens = len(qkv)
        with torch.no_grad():
            return self._function(qkv, input_pos, k_cache, v_cache)


def load(c: ModelConfig, capacity: int, device: torch.device) -> ModuleAttention | None:
    """The layer at a model's shape with a cache of `capacity`, or None with a message."""
    try:
        return ModuleAttention(executorch.load(), c, capacity, device)
    except Exception as e:  # whatever keeps the peer from loading, ours can be measured
        print(f"{executorch.MODEL} cannot be used ({type(e).__name__}: {e})")
        return None
