"""Linear layers with INT4 weights on the tensor cores.

W4A8 and W4A16 are the same integer arithmetic, rescaled into fp32 once per K-step. W4A8 quantizes a
row to INT8 in tiles of 128 columns (`ACTIVATION_TILE`), W4A16 to 15 bits, as two INT8 planes (see
`row_quantization`).
"""

import math

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.compile_case import PREFILL_TOKENS, CompileCase
from et_moe.backends.cuda.triton.int4 import NIBBLE_SCALE, high_nibbles, low_nibbles
from et_moe.backends.cuda.triton.launch import cdiv, launch
from et_moe.backends.cuda.triton.row_quantization import (
    normed,
    plane_dot,
    quantize_rows_kernel,
    quantized,
)
from et_moe.backends.cuda.triton.tuning import tuned
from et_moe.backends.ops import ACTIVATION_TILE, GROUP_SIZES

LAYOUT_VERSION = 2
"""Version of what `prepack_linear` makes."""


def _half(padded_k: int) -> int:
    """Columns between the two nibbles of a byte."""
    return math.gcd(padded_k // 2, 128)


def prepack_linear(
    weight: torch.Tensor, scale: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorders an INT4 weight of a bundle for the kernels of this file.

    K is padded with zeros to K', a multiple of 64, and cut into blocks of 2 H columns, H = 128 if
    256 divides K'. Byte j of a block has column j in its low and column j + H in its high nibble,
    in two's complement: both nibbles of a run of bytes are plain operands of a dot product. A run
    of min(H, group_size) bytes is a step; its two bf16 scales are the halves of one int32.

    Args:
        weight: `uint8 [N, K/2]`, scale: `bfloat16 [N, K/group_size]`, as from `quantize_w4`.

    Returns:
        `uint8 [N, K'/2]` and `int32 [steps, N]`.
    """
    rows, k = weight.shape[0], 2 * weight.shape[1]
    padding = -k % 64
    half = _half(k + padding)
    packed = weight.new_empty(rows, (k + padding) // 2)
    for source, target in zip(weight.split(8192), packed.split(8192), strict=True):
        # A bundle stores value + 8; flipping the top bit of that makes two's complement of it.
        nibbles = torch.stack(((source & 0xF) ^ 8, (source >> 4) ^ 8), dim=-1).flatten(-2)
        nibbles = torch.nn.functional.pad(nibbles, (0, padding))
        low, high = nibbles.unflatten(-1, (-1, 2, half)).unbind(-2)
        target.copy_((low | (high << 4)).flatten(-2))
    scale = torch.nn.functional.pad(scale, (0, cdiv(k + padding, group_size) - scale.shape[1]))
    step = min(half, group_size)
    groups = torch.arange(0, k + padding, step, device=scale.device) // group_size
    bits = scale.bfloat16().index_select(1, groups).view(torch.int16).to(torch.int32)
    low, high = bits.unflatten(1, (-1, 2, half // step)).unbind(2)
    return packed, ((low & 0xFFFF) | (high << 16)).flatten(1).t().contiguous()


@triton.jit
def _scale_pair(pair):
    """The fp32 scales of the low and the high nibbles from what `prepack_linear` makes of them."""
    low = (pair << 16).to(tl.float32, bitcast=True)
    return low, (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _w4_gemm_kernel(
    q,
    scale,
    weight,
    weight_scale,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out `[M, N]` = rescaled integer GEMM + residual, one `[BLOCK_M, BLOCK_N]` tile per program.

    The weights are the left operand: they go from shared memory through registers, where they are
    unpacked, into the matrix unit. GROUP_M tiles of rows share the weights that L2 holds. q and
    scale have rows for whole tiles of BLOCK_M.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid, width = tl.program_id(0), GROUP_M * tiles_n
    first = pid // width * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    first_m = (first + pid % width % height) * BLOCK_M
    # The last tile overlaps its neighbour rather than to reach past the end; both store the same.
    first_n = min(pid % width // height * BLOCK_N, N - BLOCK_N)
    rows_m, rows_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k = tl.arange(0, STEP)
    padded_m = tiles_m * BLOCK_M
    q += first_m.to(tl.int64) * K + rows_m[:, None] * K + k[None, :]
    weight += first_n.to(tl.int64) * (K // 2) + rows_n[:, None] * (K // 2) + k[None, :]
    scale += first_m + rows_m
    weight_scale += first_n + rows_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Stages of its own make the compiler prefetch the scales too, not only what is multiplied.
    for block in tl.range(0, K, 2 * HALF, num_stages=STAGES):
        for offset in tl.static_range(0, HALF, STEP):
            w = tl.load(weight + block // 2 + offset).to(tl.int8, bitcast=True)
            group_scales = _scale_pair(tl.load(weight_scale + (block // 2 + offset) // STEP * N))
            for high in tl.static_range(2):
                begin = block + offset + high * HALF
                half_w = high_nibbles(w) if high else low_nibbles(w)
                row_scale = tl.load(scale + begin // TILE * padded_m)
                d = tl.dot(half_w, tl.trans(tl.load(q + begin)), out_dtype=tl.int32)
                if PLANES == 2:
                    low_plane = tl.trans(tl.load(q + padded_m.to(tl.int64) * K + begin))
                    d = tl.dot(half_w, low_plane, d << 7, out_dtype=tl.int32)
                acc += d.to(tl.float32) * row_scale[None, :] * group_scales[high][:, None]
    m, n = first_m + rows_m, first_n + rows_n
    acc = tl.trans(acc)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m[:, None] < M
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _w4_gemv_kernel(
    x,
    norm_weight,
    weight,
    weight_scale,
    residual,
    out,
    eps,
    N,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """A linear layer on one row in one launch: RMSNorm, quantization, product, residual.

    K is BLOCKS blocks of 256 columns, the weight a flat `[N BLOCKS, 128]` of bytes. All of it is
    multiplied with all of x as `[128, COLUMNS]`, column c holding block c (the matrix unit computes
    eight columns anyway), and of a weight's row the column of its own block is kept. So the work
    spreads over the whole of K and every byte of the weight is read once, in order.
    """
    HALF: tl.constexpr = 128
    ROWS: tl.constexpr = BLOCK_N * BLOCKS
    STEPS: tl.constexpr = HALF // GROUP
    flat, rows_n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    j, steps = tl.arange(0, HALF), tl.arange(0, STEPS)
    first_n = min(tl.program_id(0) * (BLOCK_N * REPEAT), N - BLOCK_N * REPEAT)
    weight += first_n.to(tl.int64) * (BLOCKS * HALF) + flat[:, None] * HALF + j[None, :]
    weight_scale += (flat % BLOCKS * STEPS)[:, None] * N + (first_n + flat // BLOCKS)[:, None]
    weight_scale += steps[None, :] * N
    out += first_n + rows_n
    # All loads are on their way before the first value is needed, the weights' first.
    w, scales = tl.load(weight), tl.load(weight_scale)
    column = tl.arange(0, COLUMNS)
    at = column[:, None] * (2 * HALF) + j[None, :]
    valid = column[:, None] < BLOCKS
    low = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    high = tl.load(x + HALF + at, mask=valid, other=0.0).to(tl.float32)
    if residual is not None:
        residual += first_n + rows_n
        addend = tl.load(residual)
    if norm_weight is not None:
        low_gain = tl.load(norm_weight + at, mask=valid, other=0.0)
        high_gain = tl.load(norm_weight + HALF + at, mask=valid, other=0.0)
        squares = tl.sum(tl.sum(low * low + high * high, axis=1), axis=0)
        mean = squares / (BLOCKS * 2 * HALF)
        low = normed(low, low_gain, mean, eps, x.dtype.element_ty)
        high = normed(high, high_gain, mean, eps, x.dtype.element_ty)
    low, low_scale = quantized(low, PLANES)
    high, high_scale = quantized(high, PLANES)
    low_scale, high_scale = low_scale * NIBBLE_SCALE, high_scale * NIBBLE_SCALE

    own = (flat % BLOCKS)[:, None] == column[None, :]
    for i in tl.static_range(REPEAT):
        if i + 1 < REPEAT:
            next_w = tl.load(weight + (i + 1) * (ROWS * HALF))
            next_scales = tl.load(weight_scale + (i + 1) * BLOCK_N)
            if residual is not None:
                next_addend = tl.load(residual + (i + 1) * BLOCK_N)
        w = w.to(tl.int8, bitcast=True)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.static_range(STEPS):
            # Of x the columns of one step remain: that is cheaper than to cut the weights up.
            within = (j // GROUP == step)[None, :]
            pair = tl.sum(tl.where(steps[None, :] == step, scales, 0), axis=1)
            low_group, high_group = _scale_pair(pair)
            d = plane_dot(low_nibbles(w), tl.where(within, low, 0), PLANES)
            acc += d.to(tl.float32) * low_scale[None, :] * low_group[:, None]
            d = plane_dot(high_nibbles(w), tl.where(within, high, 0), PLANES)
            acc += d.to(tl.float32) * high_scale[None, :] * high_group[:, None]
        y = tl.sum(tl.where(own, acc, 0.0), axis=1)
        y = tl.sum(tl.reshape(y, (BLOCK_N, BLOCKS)), axis=1)
        if residual is not None:
            y += addend.to(tl.float32)
        tl.store(out + i * BLOCK_N, y.to(out.dtype.element_ty))
        if i + 1 < REPEAT:
            w, scales = next_w, next_scales
            if residual is not None:
                addend = next_addend


def _check(x, weight, scale, group_size, norm_weight, residual) -> None:
    (n, packed), k = weight.shape, x.shape[1]
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, expected one of {GROUP_SIZES}")
    steps = packed // min(_half(2 * packed), group_size)
    if 2 * packed != k + -k % 64 or tuple(scale.shape) != (steps, n):
        raise ValueError(
            f"weight {tuple(weight.shape)} and scale {tuple(scale.shape)} are not what "
            f"prepack_linear makes for x of {k} columns and group_size {group_size}"
        )
    if norm_weight is not None and tuple(norm_weight.shape) != (k,):
        raise ValueError(f"norm_weight has shape {tuple(norm_weight.shape)}, expected {(k,)}")
    if residual is not None and residual.shape[1] != n:
        raise ValueError(f"residual has {residual.shape[1]} columns, expected {n}")


def _power_of_two(limit: int) -> int:
    """The largest power of two that is not above `limit`."""
    return 1 << (limit.bit_length() - 1)


def _gemv(x, weight, scale, group_size, norm_weight, eps, residual, planes) -> torch.Tensor:
    n, blocks = weight.shape[0], weight.shape[1] // 128
    config = tuned("linear_gemv", n)
    block_n = min(config.pop("BLOCK_ROWS") // blocks, _power_of_two(n))
    repeat = min(config.pop("REPEAT"), _power_of_two(n // block_n))
    out = x.new_empty((1, n))
    launch(
        _w4_gemv_kernel,
        (cdiv(n, block_n * repeat),),
        x,
        norm_weight,
        weight,
        scale,
        residual,
        out,
        eps,
        n,
        BLOCKS=blocks,
        COLUMNS=max(blocks, 8),
        GROUP=group_size,
        PLANES=planes,
        BLOCK_N=block_n,
        REPEAT=repeat,
        **config,
    )
    return out


def _linear(x, weight, scale, group_size, norm_weight, eps, residual, planes) -> torch.Tensor:
    _check(x, weight, scale, group_size, norm_weight, residual)
    (m, k), (n, padded_k) = x.shape, (weight.shape[0], 2 * weight.shape[1])
    x = x.contiguous()
    blocks = padded_k // 256
    if isinstance(m, int) and m == 1 and padded_k == 256 * blocks == 256 * _power_of_two(blocks):
        return _gemv(x, weight, scale, group_size, norm_weight, eps, residual, planes)
    config = tuned(f"linear_w4a{8 * planes}", m)
    block_m = config["BLOCK_M"]
    config["BLOCK_N"] = min(config["BLOCK_N"], _power_of_two(n))
    half = _half(padded_k)
    step = min(half, group_size)
    padded_m = cdiv(m, block_m) * block_m
    tiles = cdiv(padded_k, ACTIVATION_TILE)
    q = x.new_empty((planes, padded_m, padded_k), dtype=torch.int8)
    q_scale = x.new_empty((tiles, padded_m), dtype=torch.float32)
    launch(
        quantize_rows_kernel,
        (m,),
        x,
        norm_weight,
        q,
        q_scale,
        eps,
        padded_m,
        K=k,
        PADDED_K=padded_k,
        TILES=triton.next_power_of_2(tiles),
        TILE=ACTIVATION_TILE,
        PLANES=planes,
        SCALE_FACTOR=NIBBLE_SCALE.value,
        num_warps=4,
    )
    out = x.new_empty((m, n))
    launch(
        _w4_gemm_kernel,
        (cdiv(m, block_m) * cdiv(n, config["BLOCK_N"]),),
        q,
        q_scale,
        weight,
        scale,
        residual,
        out,
        m,
        n,
        K=padded_k,
        GROUP=group_size,
        HALF=half,
        TILE=ACTIVATION_TILE,
        STEP=step,
        PLANES=planes,
        **config,
    )
    return out


def linear_w4a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w4a8` with weight and scale as from `prepack_linear`; `[T, N]` in x's dtype.

    One launch for one row (K a multiple of 256 and K / 256 a power of two), else two.
    """
    return _linear(x, weight, scale, group_size, norm_weight, eps, residual, planes=1)


def linear_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear_w4a16`, likewise; x takes part with 15 bits per tile of 128 columns."""
    return _linear(x, weight, scale, group_size, norm_weight, eps, residual, planes=2)


def compile_cases() -> list[CompileCase]:
    """The linear layers of Qwen3.5-35B-A3B."""

    def arguments(n, k, norm, residual, dtype=torch.bfloat16):
        def make(m, device):
            def bf16(*shape):
                return torch.randn(shape, dtype=torch.bfloat16, device=device)

            return {
                "x": bf16(m, k).to(dtype),
                "weight": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device),
                # Two bf16 of 2^-7 in an int32.
                "scale": torch.full((k // 256, n), 0x3C003C00, dtype=torch.int32, device=device),
                "group_size": 128,
                "norm_weight": bf16(k) if norm else None,
                "residual": bf16(m, n) if residual else None,
            }

        return make

    shapes = {
        "in_proj": (12352, 2048, True, False),
        "qkv_proj": (9216, 2048, True, False),
        "out_proj": (2048, 4096, False, True),
        "lm_head": (248320, 2048, True, False, torch.float32),
    }
    return [
        CompileCase(
            f"{op.__name__}/{name}",
            op,
            arguments(*shape),
            tables=(op.__name__, "linear_gemv"),
            tokens=(1,) if name == "lm_head" else (1, 16, PREFILL_TOKENS),
            gemms=frozenset({"_w4_gemm_kernel", "_w4_gemv_kernel"}),
            streams={"_w4_gemm_kernel": ("weight",), "_w4_gemv_kernel": ("weight",)},
        )
        for op in (linear_w4a8, linear_w4a16)
        for name, shape in shapes.items()
    ]


def tune_candidates() -> dict[str, list[dict]]:
    """Configurations worth trying, by tuning table; `linear_gemv` is looked up by N."""
    blocks = ((16, 32, 2), (16, 32, 4), (16, 64, 4), (32, 64, 4), (32, 128, 4), (32, 128, 8))
    blocks += ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8))
    gemm = [
        {"BLOCK_M": m, "BLOCK_N": n, "GROUP_M": 8, "STAGES": stages, "num_warps": warps}
        for m, n, warps in blocks
        for stages in (2, 3, 4)
    ]
    gemv = [
        {"BLOCK_ROWS": rows, "REPEAT": repeat, "num_warps": warps}
        for rows, warps in ((64, 2), (64, 4), (128, 4), (128, 8), (256, 8))
        for repeat in (1, 2, 4, 8)
    ]
    return {"linear_w4a8": gemm, "linear_w4a16": gemm, "linear_gemv": gemv}
