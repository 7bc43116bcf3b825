"""The demo model: its shape, and how it is computed while it is trained."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

from et_moe.examples.qwen3_5_moe.tokenizer import END_OF_TEXT
from et_moe.scripts.demo_data.corpus import CONTEXT

LINEAR, FULL = "linear_attention", "full_attention"
LAYERS = [LINEAR, FULL, LINEAR, FULL, FULL]


def model_config(tokenizer: Tokenizer) -> Qwen3_5MoeTextConfig:
    """A small model with every feature of Qwen3.5 MoE; INT4 groups of 128 divide all widths."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return Qwen3_5MoeTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        tie_word_embeddings=False,
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        eos_token_id=end,
        pad_token_id=end,
    )


def all_experts(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """A mixture by two products of all experts, in which those that were not chosen weigh nothing.

    With few small experts that is faster on a GPU than to sort rows by expert, and asks nothing
    back from it.

    Args:
        experts: Hugging Face's module.
        hidden: float [T, H].
        chosen: int64 [T, K], the experts of each row.
        weights: float [T, K].

    Returns:
        float [T, H].
    """
    count, width, size = experts.num_experts, experts.intermediate_dim, experts.hidden_dim
    gate, up = (hidden @ experts.gate_up_proj.view(-1, size).T).view(-1, count, 2, width).unbind(2)
    scale = hidden.new_zeros(len(hidden), count).scatter(1, chosen, weights)
    inner = experts.act_fn(gate) * up * scale[..., None]
    return inner.flatten(1) @ experts.down_proj.transpose(1, 2).reshape(-1, size)


ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)


def compute_all_experts(model: Qwen3_5MoeForCausalLM) -> None:
    """From now on a model is computed by `all_experts`; its weights stay."""
    model.config._experts_implementation = "all_experts"


def balance_loss(router_logits: Sequence[Tensor], config: Qwen3_5MoeTextConfig) -> Tensor:
    """The load balancing loss of Switch Transformer (arXiv 2101.03961), averaged over the layers.

    Hugging Face's own `aux_loss` sums the layers before it balances, which lets a layer ignore
    most of its experts while another makes up for it.
    """
    experts, top_k = config.num_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits,), experts, top_k) for logits in router_logits]
    return torch.stack(losses).mean()
