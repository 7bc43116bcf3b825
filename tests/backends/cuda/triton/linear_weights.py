"""Weights of linear layers for the tests: as a bundle has them, and as the kernels take them."""

import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.linear.layout import prepack_linear

INT8 = ["linear_w8a8", "linear_w8a16"]


def weights(name, n, k, group, device, dtype=torch.bfloat16, size=1.0):
    """What an op takes as its weight: as a bundle has it, with INT4 scales of `dtype`, and as the
    kernels take it."""
    weight = torch.randn(n, k) * (size + size * torch.rand(n, 1))
    if name in INT8:
        bundle = tuple(t.to(device) for t in ops.quantize_w8(weight))
        return bundle, bundle
    packed, scale = ops.quantize_w4(weight, group, scale_dtype=dtype)
    packed, scale = packed.to(device), scale.to(device)
    return (packed, scale, group), (*prepack_linear(packed, scale, group), group)
