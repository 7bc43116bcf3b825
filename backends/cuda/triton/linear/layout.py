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
    are plain operands of a dot product. A run of min(H, group_size) bytes is a step. The scales of
    its low and its high nibbles stand side by side, and kernels load both as one int32.

    Args:
        weight: `uint8 [N, K/2]`, scale: `[N, K/group_size]`, bfloat16 or float16, as from
            `quantize_w4`.

    Returns:
        `uint8 [N, K'/2]`, and the scales: two bfloat16 in an `int32 [steps, N]`, the low nibbles'
        in the lower half, or `float16 [steps, N, 2]`.
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
    if scale.dtype == torch.float16:
        pairs = scale.index_select(1, groups).unflatten(1, (-1, 2, half // step))
        return packed, pairs.transpose(2, 3).flatten(1, 2).transpose(0, 1).contiguous()
    bits = scale.bfloat16().index_select(1, groups).view(torch.int16).to(torch.int32)
    low, high = bits.unflatten(1, (-1, 2, half // step)).unbind(2)
    return packed, ((low & 0xFFFF) | (high << 16)).flatten(1).t().contiguous()


@triton.jit
def point_to_scale_pairs(scale):
    """A pointer to the scales of `prepack_linear`, as one to int32."""
    return scale.to(tl.pointer_type(tl.int32))


@triton.jit
def split_scale_pair(pair, TYPE: tl.constexpr):
    """The fp32 scales of low and of high nibbles that `prepack_linear` put side by side.

    TYPE is the element type of what it returned: float16, or int32 for bfloat16.
    """
    if tl.float16 == TYPE:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & -65536).to(tl.float32, bitcast=True)
