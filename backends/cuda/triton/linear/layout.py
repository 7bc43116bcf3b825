"""The order in which the kernels of linear layers read INT4 weights, versioned."""

import math

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.int4_packing import ZERO_BYTE, pack_nibbles
from et_moe.backends.cuda.triton.common.launch import cdiv

LAYOUT_VERSION = 2
"""Version of what `prepack_linear` makes; files of prepacked weights record it."""


def nibble_distance(padded_k: int) -> int:
    """How many columns lie between the two nibbles of a byte of a prepacked weight."""
    return math.gcd(padded_k // 2, 128)


def prepack_linear(
    weight: torch.Tensor, scale: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorders an INT4 weight of a bundle for the kernels of linear layers.

    K is padded with zeros to K', a multiple of 64, and cut into blocks of 2 H columns. H is 128 if
    256 divides K', else 64 or 32, see `nibble_distance`. Byte j of a block has column j in its low
    and column j + H in its high nibble, in two's complement, so that both nibbles of a run of bytes
    are plain operands of a dot product. A run of min(H, group_size) bytes is a step; the scales of
    its low and its high nibbles, both bf16, are the lower and the upper half of an int32.

    Args:
        weight: `uint8 [N, K/2]`, scale: `bfloat16 [N, K/group_size]`, as from `quantize_w4`.

    Returns:
        `uint8 [N, K'/2]` and `int32 [steps, N]`.
    """
    k = 2 * weight.shape[1]
    padding = -k % 64
    half = nibble_distance(k + padding)
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding // 2), value=ZERO_BYTE)
    packed = pack_nibbles(weight.unflatten(-1, (-1, half))).flatten(1)
    scale = torch.nn.functional.pad(scale, (0, cdiv(k + padding, group_size) - scale.shape[1]))
    step = min(half, group_size)
    groups = torch.arange(0, k + padding, step, device=scale.device) // group_size
    bits = scale.bfloat16().index_select(1, groups).view(torch.int16).to(torch.int32)
    low, high = bits.unflatten(1, (-1, 2, half // step)).unbind(2)
    return packed, ((low & 0xFFFF) | (high << 16)).flatten(1).t().contiguous()


@triton.jit
def split_scale_pair(pair):
    """The fp32 scales of low and of high nibbles that `prepack_linear` put into an int32."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & -65536).to(tl.float32, bitcast=True)
