"""Expert MLPs with INT4 weights; contracts in `et_moe.backends.ops.moe`.

Error of `moe_w4a8`, relative L2, with Gaussian inputs in bf16 (test_moe.py): under 0.1% against the
eager reference, since all sums are fp32 and only the result is rounded; 1.2% to 1.48% against bf16
activations, over the tokens of a batch (a single token scatters by 0.1%), of a budget of 1.5%.
INT8 tiles of 128 columns in front of GEMM 1 and of 64 in front of GEMM 2 are the fastest within it:
halving a tile doubles the rescaling of int32 sums, which at 128 takes as long as the matrix unit.
Experts up to 128 wide take 32 in front of GEMM 2: see `expert_activation_tile`.
"""

import torch

from et_moe.backends.cuda.triton.common.compile_case import PREFILL_TOKENS, CompileCase
from et_moe.backends.cuda.triton.moe.decode import moe_decode
from et_moe.backends.cuda.triton.moe.layout import PREPACK_VERSION, prepack_experts
from et_moe.backends.cuda.triton.moe.prefill import moe_prefill

__all__ = ["PREPACK_VERSION", "moe_w4a8", "moe_w4a16", "prepack_experts"]

DECODE_TOKENS = 16
"""Up to this many tokens, pairs are computed one by one; from there on they are sorted by expert
and multiplied in blocks, which reads the weights of an expert once however many pairs it has."""


def _moe(int8, x, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, group_size, residual):
    few = isinstance(x.shape[0], int) and x.shape[0] <= DECODE_TOKENS
    run = moe_decode if few else moe_prefill
    packed = (w13, w13_scale, w2, w2_scale)
    return run(x, *packed, topk_weights, topk_ids, group_size, residual, int8)


def moe_w4a8(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `et_moe.backends.ops.moe_w4a8`; the weights are those of `prepack_experts`."""
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(True, x, *packed, topk_weights, topk_ids, group_size, residual)


def moe_w4a16(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `et_moe.backends.ops.moe_w4a16`; the weights are those of `prepack_experts`."""
    packed = (w13, w13_scale, w2, w2_scale)
    return _moe(False, x, *packed, topk_weights, topk_ids, group_size, residual)


def _arguments(hidden: int, inner: int, experts: int, slots: int, group: int):
    """Random arguments for m tokens, hidden and inner multiples of 128."""

    def weight(device, *shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def scale(device, *shape):
        return torch.full(shape, 2.0**-7, dtype=torch.bfloat16, device=device)

    def arguments(m: int, device: torch.device) -> dict:
        return {
            "x": torch.randn(m, hidden, dtype=torch.bfloat16, device=device),
            "w13": weight(device, experts, inner // 64, hidden // 128, 2, 64, 64),
            "w13_scale": scale(device, experts, inner // 64, hidden // group, 2, 64),
            "w2": weight(device, experts, hidden // 64, inner // 128, 64, 64),
            "w2_scale": scale(device, experts, hidden // 64, inner // group, 64),
            "topk_weights": torch.rand(m, slots, device=device),
            "topk_ids": torch.rand(m, experts, device=device).argsort(-1)[:, :slots].int(),
            "group_size": group,
            "residual": torch.randn(m, hidden, dtype=torch.bfloat16, device=device),
        }

    return arguments


def compile_cases() -> list[CompileCase]:
    """The experts of Qwen3.5-35B-A3B, of which the last is the shared one, and narrow ones."""

    def case(op, *tables, gemms=(), streams=()):
        names = ("route", "gate_up", "down", "decode_gate_up", "decode_down")
        return CompileCase(
            f"{op.__name__}/qwen3_5_35b",
            op,
            _arguments(2048, 512, 257, 9, 128),
            tables=(*(f"{op.__name__}_{name}" for name in names), "moe_sum_slots", *tables),
            tokens=(1, DECODE_TOKENS, DECODE_TOKENS + 1, PREFILL_TOKENS),
            gemms=frozenset(gemms),
            streams={name: ("w13",) if "gate_up" in name else ("w2",) for name in streams},
        )

    prefill = ("_gate_up_kernel", "_down_kernel")
    decode = ("_decode_gate_up_kernel", "_decode_down_kernel")
    narrow = {"tokens": (1, PREFILL_TOKENS), "gemms": frozenset(prefill)}
    return [
        case(moe_w4a8, "quantize_int8", gemms=prefill, streams=(*prefill, *decode)),
        # On sm_90 Triton copies the weights of bf16 products 8 bytes at a time.
        case(moe_w4a16, streams=decode),
        CompileCase("moe_w4a8/narrow", moe_w4a8, _arguments(128, 128, 9, 3, 32), **narrow),
    ]


def tune_candidates() -> dict[str, list[dict]]:
    """Configurations worth trying, by tuning table."""
    route = [
        {"BLOCK_M": m, "CHUNK": chunk, "num_warps": warps}
        for m in (16, 32, 64)
        for chunk, warps in ((512, 4), (1024, 4), (2048, 8))
    ]
    gate_up = [
        {"STAGES": stages, "num_warps": warps} for warps in (2, 4, 8) for stages in (2, 3, 4)
    ]
    down = [
        {"BLOCK_N": n, "REPEAT": repeat, "STAGES": stages, "num_warps": warps}
        for n, repeat, warps in ((64, 4, 4), (64, 8, 4), (128, 4, 4), (128, 8, 4), (128, 4, 8))
        for stages in (2, 3, 4)
    ]
    decode = [
        {"BLOCK_N": n, "BLOCK_T": tiles, "num_warps": warps}
        for n, tiles, warps in (
            *((8, 16, 4), (8, 16, 8), (16, 8, 4), (16, 16, 4), (16, 16, 8), (16, 32, 8)),
            *((16, 64, 4), (16, 64, 8), (16, 64, 16), (32, 4, 4), (32, 8, 4), (32, 16, 4)),
            *((32, 16, 8), (32, 64, 8), (32, 64, 16), (64, 4, 4), (64, 4, 8)),
        )
    ]
    prefetch = [
        {**config, "LANES": lanes, "PREFETCH": on}
        for config in decode
        for lanes in (4, 8)
        for on in (False, True)
    ]
    decode = [
        {**config, "LANES": lanes}
        for config in decode
        for lanes in (1, 2, 4, 8)
        if 8 <= config["BLOCK_T"] * lanes // config["num_warps"] <= 32
    ]
    tables = {"moe_sum_slots": [{"BLOCK": b, "num_warps": b // 256} for b in (512, 1024, 2048)]}
    for op in ("moe_w4a8", "moe_w4a16"):
        tables[f"{op}_route"] = route
        tables[f"{op}_gate_up"] = gate_up
        tables[f"{op}_down"] = down
        tables[f"{op}_decode_gate_up"] = prefetch
        tables[f"{op}_decode_down"] = decode
    return tables
