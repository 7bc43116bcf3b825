"""Tokens in front of, and activations between, the expert GEMMs of Qwen3.5-35B-A3B."""

from et_moe.backends.cuda.triton.cases.op_case import OpCase, random_tensor
from et_moe.backends.cuda.triton.quantization.op import quantize_int8, silu_quantize_int8
from et_moe.backends.ops import ACTIVATION_TILE, expert_activation_tile


def _arguments(columns: int, tile: int):
    return lambda m, device: {"x": random_tensor(m, columns, device=device), "tile": tile}


_TABLES = ("quantize_int8",)
_HIDDEN = _arguments(2048, ACTIVATION_TILE)
_GATED = _arguments(1024, expert_activation_tile(512))

CASES = [
    OpCase("quantize_int8/hidden", quantize_int8, _HIDDEN, _TABLES),
    OpCase("silu_quantize_int8/experts", silu_quantize_int8, _GATED, _TABLES),
]

CANDIDATES = {
    "quantize_int8": [
        {"BLOCK": block, "num_warps": warps}
        for block, warps in ((8, 4), (16, 2), (16, 4), (32, 4), (32, 8), (64, 8))
    ]
}
