"""The linear layers of Qwen3.5-35B-A3B."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import PREFILL_TOKENS, OpCase, random_tensor
from et_moe.backends.cuda.triton.common.tokens import DECODE_TOKENS, LINEAR_ROWS
from et_moe.backends.cuda.triton.linear.dense import linear
from et_moe.backends.cuda.triton.linear.op import (
    linear_w4a8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
)
from et_moe.backends.cuda.triton.linear.row_quantization import rms_norm


def example_weight(n: int, k: int, device: torch.device, bits: int = 4) -> dict:
    """A weight of a linear layer, k a multiple of 256, as keyword arguments."""
    if bits == 16:
        return {"weight": random_tensor(n, k, device=device)}
    if bits == 8:
        return {
            "weight": torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device),
            "scale": torch.full((n, 1), 2.0**-7, dtype=torch.bfloat16, device=device),
        }
    return {
        "weight": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device),
        # Two bf16 of 2^-7 in an int32.
        "scale": torch.full((k // 256, n), 0x3C003C00, dtype=torch.int32, device=device),
        "group_size": 128,
    }


def _arguments(n: int, k: int, norm: bool, residual: bool, bits: int, dtype=torch.bfloat16):
    def arguments(m, device):
        return {
            "x": random_tensor(m, k, device=device, dtype=dtype),
            **example_weight(n, k, device, bits),
            "norm_weight": random_tensor(k, device=device) if norm else None,
            "residual": random_tensor(m, n, device=device) if residual else None,
        }

    return arguments


_SHAPES = {
    "in_proj": (12352, 2048, True, False),
    "qkv_proj": (9216, 2048, True, False),
    "out_proj": (2048, 4096, False, True),
}


def _cases(op, bits: int, shapes: dict, head: bool = True) -> list[OpCase]:
    gemv, few = f"linear_w{bits}_gemv", f"linear_w{bits}_rows"
    some = (f"linear_w{bits}_few_rows",) if "a8" in op.__name__ else ()

    # Activations of 16 bits are quantized ahead of few rows.
    loop, tables = (
        ("_gemv_loop_kernel", (gemv,)) if "a8" in op.__name__ else ("_rows_kernel", (gemv, few))
    )
    multiply = ("_gemv_kernel", loop, "_gemm_kernel", *(("_few_rows_kernel",) if some else ()))

    def case(name, arguments, tokens, *kernels, tables=(op.__name__, *some, *tables)):
        gemms = frozenset(kernels) & {"_few_rows_kernel", "_gemm_kernel"}
        streams = {kernel: ("weight",) for kernel in kernels}
        return OpCase(f"{op.__name__}/{name}", op, arguments, tables, tokens, gemms, streams)

    found = [
        case(
            name,
            _arguments(*shape, bits),
            (1, LINEAR_ROWS, 8, DECODE_TOKENS, PREFILL_TOKENS),
            *multiply,
        )
        for name, shape in shapes.items()
    ]
    lm_head = _arguments(248320, 2048, True, False, bits, torch.float32)
    if head:
        found += [
            case("lm_head", lm_head, (1,), "_gemv_kernel", tables=(gemv,)),
            case("lm_head_of_two", lm_head, (2,), "_rows_kernel", tables=(few,)),
            case("lm_head_of_a_batch", lm_head, (LINEAR_ROWS,), "_rows_kernel", tables=(few,)),
            case("lm_head_of_many", lm_head, (DECODE_TOKENS,), "_gemm_kernel", tables=some),
        ]
    return found


# Of INT8 weights the shapes that differ in what is fused.
_TWO = {name: _SHAPES[name] for name in ("in_proj", "out_proj")}


def _norm_arguments(m: int, device: torch.device) -> dict:
    return {
        "x": random_tensor(m, 2048, device=device),
        "weight": random_tensor(2048, device=device),
    }


CASES = [
    OpCase("rms_norm", rms_norm, _norm_arguments),
    *_cases(linear_w4a8, 4, _SHAPES),
    *_cases(linear_w4a16, 4, _SHAPES),
    *_cases(linear_w8a8, 8, _TWO),
    *_cases(linear_w8a16, 8, {"in_proj": _SHAPES["in_proj"]}, head=False),
    OpCase(
        "linear/in_proj",
        linear,
        _arguments(*_SHAPES["in_proj"], 16),
        ("linear_dense", "linear_dense_rows"),
        (1, LINEAR_ROWS, PREFILL_TOKENS),
        streams={"_dense_rows_kernel": ("weight",), "_dense_gemm_kernel": ("weight",)},
    ),
    OpCase("linear/out_proj", linear, _arguments(*_SHAPES["out_proj"], 16), tokens=(LINEAR_ROWS,)),
    OpCase(
        "linear/lm_head",
        linear,
        _arguments(248320, 2048, True, False, 16, torch.float32),
        ("linear_dense_fp32", "linear_dense_rows"),
        (1, PREFILL_TOKENS),
    ),
]

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
    for rows, warps in ((64, 2), (128, 2), (128, 4), (256, 4), (512, 4), (256, 8), (512, 8))
]

# A row of an INT8 weight has twice the blocks of an INT4 one.
_GEMV_INT8 = [config | {"SPAN": 2 * config["SPAN"]} for config in _GEMV]
_DENSE_ROWS = [{"BLOCK_N": n, "num_warps": w} for n, w in ((2, 2), (4, 4), (8, 4), (8, 8))]

# With MOST_ROWS 0 the GEMM takes all of these rows.
_FEW_ROWS = [{"BLOCK_N": 16, "MOST_ROWS": 0, "num_warps": 2}] + [
    {"BLOCK_N": n, "MOST_ROWS": most, "num_warps": warps}
    for n, warps in ((16, 2), (32, 2), (16, 4), (32, 4), (16, 8))
    for most in (8, DECODE_TOKENS)
]

CANDIDATES = {
    "linear_dense": [config | {"BLOCK_K": 64} for config in _GEMM],
    "linear_dense_fp32": [config | {"BLOCK_K": 32} for config in _GEMM],
    "linear_dense_rows": _DENSE_ROWS,
    "linear_w4a8": _GEMM,
    "linear_w4a16": _GEMM,
    "linear_w8a8": _GEMM,
    "linear_w8a16": _GEMM,
    "linear_w4_gemv": _GEMV,
    "linear_w4_rows": _ROWS,
    "linear_w4_few_rows": _FEW_ROWS,
    "linear_w8_few_rows": _FEW_ROWS,
    "linear_w8_gemv": _GEMV_INT8,
    "linear_w8_rows": _ROWS,
}
