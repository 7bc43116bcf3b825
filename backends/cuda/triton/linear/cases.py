"""The linear layers of Qwen3.5-35B-A3B."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import PREFILL_TOKENS, OpCase, random_tensor
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.linear.op import linear_w4a8, linear_w4a16


def example_weight(n: int, k: int, device: torch.device) -> dict:
    """Weight, scale and group_size of a linear layer, k a multiple of 256, as keyword arguments."""
    return {
        "weight": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device),
        # Two bf16 of 2^-7 in an int32.
        "scale": torch.full((k // 256, n), 0x3C003C00, dtype=torch.int32, device=device),
        "group_size": 128,
    }


def _arguments(n: int, k: int, norm: bool, residual: bool, dtype: torch.dtype = torch.bfloat16):
    def arguments(m, device):
        return {
            "x": random_tensor(m, k, device=device, dtype=dtype),
            **example_weight(n, k, device),
            "norm_weight": random_tensor(k, device=device) if norm else None,
            "residual": random_tensor(m, n, device=device) if residual else None,
        }

    return arguments


_SHAPES = {
    "in_proj": (12352, 2048, True, False),
    "qkv_proj": (9216, 2048, True, False),
    "out_proj": (2048, 4096, False, True),
}


def _cases(op) -> list[OpCase]:
    def case(name, arguments, tokens, *kernels, tables=(op.__name__, "linear_gemv", "linear_rows")):
        gemms = frozenset(kernels) & {"_w4_gemm_kernel"}
        streams = {kernel: ("weight",) for kernel in kernels}
        return OpCase(f"{op.__name__}/{name}", op, arguments, tables, tokens, gemms, streams)

    kernels = ("_w4_gemv_kernel", "_w4_rows_kernel", "_w4_gemm_kernel")
    lm_head = _arguments(248320, 2048, True, False, torch.float32)
    rows = (LINEAR_ROWS,)
    return [
        *(
            case(name, _arguments(*shape), (1, LINEAR_ROWS, PREFILL_TOKENS), *kernels)
            for name, shape in _SHAPES.items()
        ),
        case("lm_head", lm_head, (1,), kernels[0], tables=("linear_gemv",)),
        case("lm_head_of_a_batch", lm_head, rows, kernels[1], tables=("linear_rows",)),
    ]


CASES = [*_cases(linear_w4a8), *_cases(linear_w4a16)]

_FEW = ((16, 16, 2), (16, 32, 2), (16, 32, 4), (16, 64, 4), (32, 32, 4), (64, 16, 4), (64, 32, 4))
_SOME = ((32, 64, 4), (64, 64, 4))
_MANY = ((32, 128, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8))
_GEMM = [
    {"BLOCK_M": m, "BLOCK_N": n, "GROUP_M": 8, "STAGES": stages, "num_warps": warps}
    # Small tiles have few bytes under way per stage.
    for blocks, depths in ((_FEW, (3, 5)), (_SOME, (3, 4)), (_MANY, (2, 3, 4)))
    for m, n, warps in blocks
    for stages in depths
]
_GEMV = [
    {"BLOCK_ROWS": rows, "SPAN": span, "REPEAT": repeat, "num_warps": warps}
    for rows, warps in ((128, 4), (256, 4), (256, 8))
    for span in (1, 2)
    for repeat in (1, 8)
]

_ROWS = [
    {"BLOCK_ROWS": rows, "num_warps": warps}
    for rows, warps in ((64, 2), (128, 2), (64, 4), (128, 4), (256, 4), (128, 8), (256, 8))
]

CANDIDATES = {
    "linear_w4a8": _GEMM,
    "linear_w4a16": _GEMM,
    "linear_gemv": _GEMV,
    "linear_rows": _ROWS,
}
