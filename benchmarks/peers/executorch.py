"""The ExecuTorch wheel's own Qwen3.5 MoE as a peer: its modules and kernels, random INT4 weights.

The modules are called as the wheel's export calls them (`executorch.examples.models.qwen3_5_moe`):
decode with the matrix-vector kernels, prefill with the batched experts (bf16 or INT8 activations)
and dequantized linear layers. They are run from Python, as they are and under torch.compile, and
are captured in a CUDA graph, which is at least as fast as the exported program. Prefill needs
flash-linear-attention==0.4.2.
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import nn

from et_moe.benchmarks.timing import microseconds
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.make_bundle import WEIGHT_RMS

MODEL = "executorch.examples.models.qwen3_5_moe.model"
KERNELS = "executorch.backends.cuda.triton.kernels"
LINEARS = ("qkv_proj", "o_proj", "in_proj", "out_proj", "gate_up_proj", "down_proj", "lm_head")
GROUP = 128
CALLS = (("decode", "bf16"), ("prefill", "int8"), ("prefill", "bf16"))
"""Phases, and the dtypes of the experts' activations in them; in decode there is only bf16."""


def load() -> ModuleType:
    """The wheel's model, with its kernels registered.

    Raises:
        ImportError: the wheel or something that it needs is not installed.
    """
    importlib.import_module(KERNELS)
    return importlib.import_module(MODEL)


def _packed(*shape: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    *rows, k = shape
    weight = torch.empty(*rows, k // 2, dtype=torch.int8)
    return weight, torch.empty(*rows, k // group, dtype=torch.bfloat16)


def _quantize_shapes(um: ModuleType, model: nn.Module, group: int) -> None:
    """Puts INT4 layers in place of the float ones; all on the meta device."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in LINEARS and isinstance(child, nn.Linear):
                layer = um.W4DequantLinear(child.in_features, child.out_features, group)
                layer.w_packed, layer.w_scale = _packed(*child.weight.shape, group=group)
                setattr(parent, name, layer)
        if isinstance(parent, um.FusedMoEExperts):
            parent.group_size = group
            for name in ("w1", "w2"):
                shape = getattr(parent, f"{name}_weight").shape
                delattr(parent, f"{name}_weight")
                weight, scale = _packed(*shape, group=group)
                parent.register_buffer(name, weight)
                parent.register_buffer(f"{name}_scale", scale)


def fill(um: ModuleType, model: nn.Module, c: ModelConfig) -> None:
    """Sets weights to random values, state to zero, and the rest as the modules compute it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.int8:
            tensor.random_(-128, 128)
        elif name.endswith("scale"):
            tensor.uniform_(0.5, 1.5).mul_(WEIGHT_RMS / 4.6)  # 4.6: rms of a random INT4
        elif name.endswith(("_cache", "_state")):
            tensor.zero_()
        elif name.endswith("cache_positions"):
            tensor.copy_(torch.arange(len(tensor)))
        else:
            tensor.normal_(std=WEIGHT_RMS)
    for module in model.modules():
        if isinstance(module, um.RotaryEmbedding):
            inverse = c.rope_theta ** -(torch.arange(0, c.rotary_dim, 2) / c.rotary_dim)
            module.inv_freq = inverse.to(module.inv_freq.device)


def model_config(um: ModuleType, c: ModelConfig, max_seq_len: int) -> object:
    """The wheel's own configuration of a shape."""
    return um.Qwen35MoEConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        partial_rotary_factor=c.partial_rotary_factor,
        linear_num_key_heads=c.linear_num_key_heads,
        linear_num_value_heads=c.linear_num_value_heads,
        linear_key_head_dim=c.linear_key_head_dim,
        linear_value_head_dim=c.linear_value_head_dim,
        linear_conv_kernel_dim=c.linear_conv_kernel_dim,
        num_experts=c.num_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        moe_intermediate_size=c.moe_intermediate_size,
        shared_expert_intermediate_size=c.shared_expert_intermediate_size,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        max_seq_len=max_seq_len,
        layer_types=list(c.layer_types),
    )


def build(
    um: ModuleType, c: ModelConfig, max_seq_len: int, device: torch.device, group: int = GROUP
) -> nn.Module:
    """The wheel's model of a shape, with random weights, in the dtypes that its export gives it."""
    with torch.device("meta"):
        model = um.Qwen35MoE(model_config(um, c, max_seq_len)).to(torch.bfloat16)
        _quantize_shapes(um, model, group)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    fill(um, model, c)
    return model


def set_mode(um: ModuleType, model: nn.Module, phase: str, activations: str) -> None:
    """Chooses the kernels of "prefill" or "decode"."""
    for module in model.modules():
        if isinstance(module, um.FusedMoEExperts):
            module.use_batched_moe = phase == "prefill"
            module.moe_activation_dtype = activations
        elif isinstance(module, um.W4DequantLinear):
            module.use_dequant_prefill = phase == "prefill"


def call(model: nn.Module, c: ModelConfig, phase: str, prompt: int, device: torch.device):
    """A function that runs a prefill of `prompt` tokens, or one token after them."""
    first, count = (0, prompt) if phase == "prefill" else (prompt, 1)
    tokens = torch.randint(0, c.vocab_size, (1, count), device=device)
    positions = torch.arange(first, first + count, device=device)
    temperature = torch.ones(1, device=device)
    return lambda: model(tokens, positions, temperature)


def _timed(function: Callable[[], object]) -> tuple[float, bool]:
    """Microseconds, and whether they are those of a captured CUDA graph."""
    try:
        return microseconds([function]), True
    except Exception as e:  # what cannot be captured is timed as it is
        print(f"not captured ({type(e).__name__}: {str(e)[:200]})", flush=True)
        torch.cuda.synchronize()
        from triton.testing import do_bench

        return do_bench(function, return_mode="median") * 1e3, False


def measure(c: ModelConfig, prompts: list[int], new_tokens: int) -> Iterator[dict]:
    """Yields a row for each prompt and each of `CALLS`, of the modules as they are and compiled.

    Decode is timed in the middle of the `new_tokens` that follow a prompt.
    """
    um, device = load(), torch.device("cuda")
    # One layer's code serves all layers, each of which may compile it anew.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    model = build(um, c, max(prompts) + new_tokens, device)
    for compiled in (False, True):
        if compiled:
            for layer in model.layers:
                layer.compile(dynamic=False)
        for prompt in prompts:
            for phase, activations in CALLS:
                variant = f"{'compiled' if compiled else 'as it is'}, {activations}"
                row = {"peer": "ExecuTorch", "phase": phase, "variant": variant, "prompt": prompt}
                set_mode(um, model, phase, activations)
                at = prompt + (new_tokens // 2 if phase == "decode" else 0)
                try:
                    with torch.no_grad():
                        us, captured = _timed(call(model, c, phase, at, device))
                except Exception as e:  # one that fails must not end the comparison
                    yield row | {"error": f"{type(e).__name__}: {str(e)[:300]}"}
                    continue
                tokens = 1 if phase == "decode" else prompt
                yield row | {"tok_s": tokens / us * 1e6, "captured": captured}
