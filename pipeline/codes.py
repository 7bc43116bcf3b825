"""INT4 weights of a checkpoint on their way into a bundle, with the values and scales they have.

A model fuses and pads the weights of a checkpoint by rows and columns (`Model.groups`) and does not
know how they are stored. So an INT4 weight travels as codes, `uint32 [..., N, K]`, one for each
weight: its lower half is the value, -8 to 7, in two's complement, and its upper half has the bits
of the group's scale. A code of zero is a weight of zero, so that zeros pad a weight.
"""

import torch
from torch import Tensor

from et_moe.backends import ops

CODES = torch.uint32
"""No other tensor of a checkpoint has this dtype."""


def _halves(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the bits of the scales, `int16 [..., N, K]`: views."""
    return codes.contiguous().view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)


def encode(packed: Tensor, scale: Tensor) -> Tensor:
    """The codes `uint32 [N, K]` of a weight.

    Args:
        packed: `uint8 [N, K/2]`, see `ops.pack_int4`.
        scale: `[N, K/group_size]`, bfloat16 or float16.
    """
    codes = torch.empty((packed.shape[0], 2 * packed.shape[1]), dtype=CODES)
    values, scale_bits = _halves(codes)
    values[:, 0::2], values[:, 1::2] = packed & 0xF, packed >> 4
    values -= 8
    groups = scale_bits.unflatten(1, (scale.shape[1], -1))
    groups.copy_(scale.contiguous().view(torch.int16).unsqueeze(-1))
    return codes


def decode(codes: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values `uint8 [..., N, K/2]` and scales `[..., N, K/group_size]` of codes.

    Raises:
        ValueError: weights of a group have different scales, or one that is not finite.
    """
    values, scale_bits = _halves(codes)
    groups = scale_bits.unflatten(-1, (-1, group_size))
    if not (groups == groups[..., :1]).all():
        raise ValueError(f"groups of {group_size} columns have more than one scale")
    scale = groups[..., 0].contiguous().view(scale_dtype)
    if not torch.isfinite(scale).all():
        raise ValueError("the weight has scales that are not finite")
    return ops.pack_int4(values), scale


def dequantize(codes: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The weights themselves, `float32 [..., N, K]`: the products of 4 and of 11 bits are exact."""
    values, scale_bits = _halves(codes)
    return values.float() * scale_bits.contiguous().view(scale_dtype).float()
