"""What is in front of the out projections of Qwen3.5-35B-A3B, with them, for 5 to 16 rows.

m is the number of sequences, or of tokens of one.
"""

import torch

from et_moe.backends.cuda.triton.attention import cases as attention
from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor
from et_moe.backends.cuda.triton.gated_delta_net import cases as gated_delta_net
from et_moe.backends.cuda.triton.linear.cases import example_weight
from et_moe.backends.cuda.triton.out_projection.op import attention_out, gated_delta_net_out

_K, _N = 4096, 2048


def _with_layer(arguments, bits: int):
    """Those of a mixer, which `arguments` makes, and of the layer behind it."""

    def both(m, device):
        layer = {"group_size": None} | example_weight(_N, _K, device, bits)
        return {
            "given": arguments(m, device),
            **layer,
            "residual": random_tensor(m, _N, device=device),
        }

    return both


def _attention_case(name: str, batch: bool, bits: int) -> OpCase:
    arguments = _with_layer(attention.arguments_of(attention.QWEN3_5_35B, batch), bits)
    return OpCase(f"out_projection/attention_{name}", attention_out, arguments, tokens=(7,))


def _net_case(name: str, bits: int, **options) -> OpCase:
    given = gated_delta_net.net_arguments(*gated_delta_net.QWEN3_5_35B, **options)
    arguments, tokens = _with_layer(given, bits), (8,)
    return OpCase(f"out_projection/net_{name}", gated_delta_net_out, arguments, tokens=tokens)


CASES = [
    _attention_case("prompt", batch=False, bits=4),
    _attention_case("batch", batch=True, bits=4),
    _attention_case("batch_w8", batch=True, bits=8),
    _net_case("batch", bits=4, batch=True),
    _net_case("batch_w8", bits=8, batch=True),
    _net_case("batch_bf16_state", bits=4, batch=True, state_dtype=torch.bfloat16),
]
