"""The experts of Qwen3.5-35B-A3B and Qwen3-Next-80B-A3B, the shared one last, and narrow ones."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import PREFILL_TOKENS, OpCase, random_tensor
from et_moe.backends.cuda.triton.common.tokens import DECODE_TOKENS, LINEAR_ROWS
from et_moe.backends.cuda.triton.moe.op import (
    moe,
    moe_w4a8,
    moe_w4a16,
    moe_w8a8,
    moe_w8a16,
)

_PREFILL = ("_gate_up_kernel", "_down_kernel")
_DECODE = ("_decode_gate_up_kernel", "_decode_down_kernel")
_FEW = ("_few_gate_up_kernel", "_few_down_kernel")


def _random_weight(bits: int, *shape: int, device: torch.device) -> torch.Tensor:
    """A prepacked weight of so many bits; the last of its sizes is that of bytes or numbers."""
    if bits == 16:
        return random_tensor(*shape, device=device)
    low, high, dtype = (0, 256, torch.uint8) if bits == 4 else (-127, 128, torch.int8)
    return torch.randint(low, high, shape, dtype=dtype, device=device)


def _arguments(hidden: int, inner: int, experts: int, slots: int, bits: int, group: int = 128):
    """Random arguments for m tokens, hidden and inner multiples of 128; group: of INT4 weights."""

    def arguments(m, device):
        def scale(*shape):
            return torch.full(shape, 2.0**-7, dtype=torch.bfloat16, device=device)

        width = 64 if bits == 4 else 128
        up_groups, down_groups = (hidden // group, inner // group) if bits == 4 else (1, 1)
        up = (experts, inner // 64, hidden // 128, 2, 64, width)
        down = (experts, hidden // 64, inner // 128, 64, width)
        scales = {
            "w13_scale": scale(experts, inner // 64, up_groups, 2, 64),
            "w2_scale": scale(experts, hidden // 64, down_groups, 64),
        }
        return {
            "x": random_tensor(m, hidden, device=device),
            "w13": _random_weight(bits, *up, device=device),
            "w2": _random_weight(bits, *down, device=device),
            "topk_weights": torch.rand(m, slots, device=device),
            "topk_ids": torch.rand(m, experts, device=device).argsort(-1)[:, :slots].int(),
            "residual": random_tensor(m, hidden, device=device),
            **({} if bits == 16 else scales),
            **({"group_size": group} if bits == 4 else {}),
        }

    return arguments


_TOKENS = (1, LINEAR_ROWS, DECODE_TOKENS, DECODE_TOKENS + 1, PREFILL_TOKENS)
_QWEN3_5_35B = {bits: _arguments(2048, 512, 257, 9, bits) for bits in (4, 8, 16)}
_QWEN3_NEXT_80B = _arguments(2048, 512, 513, 11, 4)


def _tables(op: str) -> tuple[str, ...]:
    names = ["route", "gate_up", "down", "decode_gate_up", "decode_down"]
    if op.endswith("a8"):
        names += ["few_gate_up", "few_down"]
    return (*(f"{op}_{name}" for name in names), "moe_sum_slots")


def _streams(*kernels: str) -> dict[str, tuple[str, ...]]:
    return {name: ("w13",) if "gate_up" in name else ("w2",) for name in kernels}


_INT8 = {"gemms": frozenset(_PREFILL), "streams": _streams(*_PREFILL, *_DECODE, *_FEW)}

CASES = [
    OpCase(
        "moe_w4a8/qwen3_5_35b",
        moe_w4a8,
        _QWEN3_5_35B[4],
        (*_tables("moe_w4a8"), "quantize_int8"),
        _TOKENS,
        **_INT8,
    ),
    OpCase("moe_w4a8/qwen3_next_80b", moe_w4a8, _QWEN3_NEXT_80B, (), _TOKENS, **_INT8),
    # On sm_90 Triton copies the weights of bf16 products 8 bytes at a time.
    OpCase(
        "moe_w4a16/qwen3_5_35b",
        moe_w4a16,
        _QWEN3_5_35B[4],
        _tables("moe_w4a16"),
        _TOKENS,
        streams=_streams(*_DECODE),
    ),
    OpCase(
        "moe_w4a8/narrow",
        moe_w4a8,
        _arguments(128, 128, 9, 3, 4, 32),
        gemms=frozenset(_PREFILL),
    ),
    OpCase(
        "moe_w8a8/qwen3_5_35b",
        moe_w8a8,
        _QWEN3_5_35B[8],
        _tables("moe_w8a8"),
        _TOKENS,
        **_INT8,
    ),
    OpCase(
        "moe_w8a8/narrow",
        moe_w8a8,
        _arguments(128, 128, 9, 3, 8),
        gemms=frozenset(_PREFILL),
    ),
    OpCase(
        "moe_w8a16/qwen3_5_35b",
        moe_w8a16,
        _QWEN3_5_35B[8],
        _tables("moe_w8a16"),
        _TOKENS,
        streams=_streams(*_DECODE),
    ),
    OpCase(
        "moe/qwen3_5_35b",
        moe,
        _QWEN3_5_35B[16],
        _tables("moe_dense"),
        _TOKENS,
        streams=_streams(*_PREFILL, *_DECODE),
    ),
]

_DECODE_BLOCKS = (
    *((8, 16, 4), (8, 16, 8), (16, 8, 4), (16, 16, 4), (16, 16, 8), (16, 32, 8)),
    *((16, 64, 4), (16, 64, 8), (16, 64, 16), (32, 4, 4), (32, 8, 4), (32, 16, 4)),
    *((32, 16, 8), (32, 64, 8), (32, 64, 16), (64, 4, 4), (64, 4, 8)),
)
_DOWN_BLOCKS = ((64, 4, 4), (64, 8, 4), (128, 4, 4), (128, 8, 4), (128, 4, 8))

_EXPERT_CANDIDATES = {
    "route": [
        {"BLOCK_M": m, "CHUNK": chunk, "num_warps": warps}
        for m in (16, 32, 64)
        for chunk, warps in ((512, 4), (1024, 4), (2048, 8))
    ],
    "gate_up": [
        {"STAGES": stages, "num_warps": warps} for warps in (2, 4, 8) for stages in (2, 3, 4)
    ],
    "down": [
        {"BLOCK_N": n, "REPEAT": repeat, "STAGES": stages, "num_warps": warps}
        for n, repeat, warps in _DOWN_BLOCKS
        for stages in (2, 3, 4)
    ],
    "decode_gate_up": [
        {"BLOCK_N": n, "BLOCK_T": tiles, "LANES": lanes, "PREFETCH": on, "WEIGHTS_FIRST": first}
        | {"num_warps": warps}
        for n, tiles, warps in _DECODE_BLOCKS
        for lanes in (4, 8)
        for on in (False, True)
        for first in ((False, True) if tiles >= 16 else (False,))
    ],
    "decode_down": [
        {"BLOCK_N": n, "BLOCK_T": tiles, "num_warps": warps, "LANES": lanes}
        for n, tiles, warps in _DECODE_BLOCKS
        for lanes in (1, 2, 4, 8)
        if 8 <= tiles * lanes // warps <= 32
    ],
}
_EXPERT_CANDIDATES |= {
    f"few_{kernel}": [
        {"BLOCK_N": n, "BLOCK_T": tiles, "LANES": 8, "num_warps": warps}
        for n, tiles, warps in _DECODE_BLOCKS
    ]
    for kernel in ("gate_up", "down")
}

_EXPERTS = ("moe_w4a8", "moe_w4a16", "moe_w8a8", "moe_w8a16", "moe_dense")

CANDIDATES = {
    "moe_sum_slots": [{"BLOCK": b, "num_warps": b // 256} for b in (512, 1024, 2048)],
    **{
        f"{op}_{kernel}": configs
        for op in _EXPERTS
        for kernel, configs in _EXPERT_CANDIDATES.items()
        if op.endswith("a8") or not kernel.startswith("few")
    },
}

ONE_ORDER = {
    f"{op}_{kernel}": ("BLOCK_T", "LANES", "num_warps")
    for op in _EXPERTS
    for kernel in ("decode_gate_up", "decode_down", "few_gate_up", "few_down")
    if op.endswith("a8") or not kernel.startswith("few")
}
