"""A few tokens through INT4 experts: two matrix-vector kernels over (token, slot) pairs.

This is bound by the bytes of the weights, so every thread block loads all of its weights at once
and prepares the activations while they are under way. Quantizing the few activations again in every
thread block costs less than a launch of its own.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.dependent_launch import prefetch, wait_for_previous
from et_moe.backends.cuda.triton.int4 import NIBBLE_SCALE, dot_bytes
from et_moe.backends.cuda.triton.launch import cdiv, launch
from et_moe.backends.cuda.triton.quantization import int8_scale, round_int8, silu
from et_moe.backends.cuda.triton.tuning import tuned
from et_moe.backends.ops import ACTIVATION_TILE, expert_activation_tile

_UPPER_NIBBLES = tl.constexpr(-0x0F0F0F10)  # 0xF0F0F0F0


@triton.jit
def _load_words(x, limit, WORDS: tl.constexpr):
    """`float32 [STEPS, WORDS, 4]` from pointers `[STEPS]`; columns from `limit` on are 0."""
    column = tl.arange(0, WORDS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = column[None, :, :] < limit[:, None, None]
    return tl.load(x[:, None, None] + column[None, :, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tile_amax(x, CHUNKS: tl.constexpr):
    """Largest magnitude `[STEPS]`, over CHUNKS consecutive steps, which share a tile."""
    amax = tl.max(tl.max(tl.abs(x), axis=2), axis=1)
    if CHUNKS == 1:
        return amax
    STEPS: tl.constexpr = x.shape[0]
    tiles = tl.max(amax.reshape(STEPS // CHUNKS, CHUNKS), axis=1)
    return tl.broadcast_to(tiles[:, None], (STEPS // CHUNKS, CHUNKS)).reshape(STEPS)


@triton.jit
def _pack_int8(x, inverse):
    """Quantizes `[STEPS, WORDS, 4]` to int8, four in an int32: `[STEPS, 1, WORDS]`."""
    q = round_int8(x * inverse[:, None, None]) & 0xFF
    return tl.sum(q << (tl.arange(0, 4) * 8)[None, None, :], axis=2)[:, None, :]


@triton.jit
def _quantize_steps(x, limit, TILE: tl.constexpr, WORDS: tl.constexpr):
    """Activations of the low and the high nibbles of steps, see `_dot_steps`.

    Returns:
        int8, four in an int32, `[STEPS, 1, WORDS]` each, and their scales, `float32 [STEPS]` each.
        For TILE 0 the pointers x instead of all these: floats are loaded column by column.
    """
    if TILE == 0:
        return x, x, x, x
    else:
        CHUNKS: tl.constexpr = 1 if TILE == 4 * WORDS else 16 // WORDS  # steps that share a scale
        low, high = _load_words(x, limit, WORDS), _load_words(x + 64, limit - 64, WORDS)
        amax_low, amax_high = _tile_amax(low, CHUNKS), _tile_amax(high, CHUNKS)
        if TILE == 128:
            amax_low = tl.maximum(amax_low, amax_high)
            amax_high = amax_low
        inverse_low, scale_low = int8_scale(amax_low, TILE == 128)
        inverse_high, scale_high = int8_scale(amax_high, TILE == 128)
        return _pack_int8(low, inverse_low), _pack_int8(high, inverse_high), scale_low, scale_high


@triton.jit
def _load_weights(
    words,
    offset,
    valid,
    scales,
    scale_offset,
    next_group,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Weights of steps, int32 words `[STEPS, ROWS, WORDS]`, and their scales.

    Args:
        words, offset: the weights, as int32 words, at `offset [STEPS, ROWS]`.
        valid: `[STEPS]`; what is not counts as zero.
        scales, scale_offset: scales of the low nibbles at `scale_offset [STEPS, ROWS]`; those of
            the high ones are next_group further on (if GROUP is not 128).
    """
    source = words + offset[:, :, None] + tl.arange(0, WORDS)[None, None, :]
    packed = tl.load(source, mask=valid[:, None, None], other=0)
    low = tl.load(scales + scale_offset, mask=valid[:, None], other=0.0).to(tl.float32)
    low *= NIBBLE_SCALE
    if GROUP == 128:
        return packed, low, low
    high = scales + scale_offset + next_group
    high = tl.load(high, mask=valid[:, None], other=0.0).to(tl.float32) * NIBBLE_SCALE
    return packed, low, high


@triton.jit
def _dot_float(packed, x, limit, WORDS: tl.constexpr):
    """`_dot_steps` before weight scales, low and high nibbles apart, for float activations."""
    low = tl.zeros(packed.shape, tl.float32)
    high = tl.zeros(packed.shape, tl.float32)
    for i in tl.static_range(4):
        column = tl.arange(0, WORDS)[None, :] * 4 + i
        source = x[:, None] + column
        x_low = tl.load(source, mask=column < limit[:, None], other=0.0).to(tl.float32)
        x_high = tl.load(source + 64, mask=column + 64 < limit[:, None], other=0.0).to(tl.float32)
        # 16 * the nibble, sign-extended.
        byte = (packed << (24 - 8 * i)) >> 24
        low += ((byte << 28) >> 24).to(tl.float32) * x_low[:, None, :]
        high += (byte & -16).to(tl.float32) * x_high[:, None, :]
    return tl.sum(low, axis=2), tl.sum(high, axis=2)


@triton.jit
def _dot_steps(
    weights,
    activations,
    limit,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """sum over columns of weight[step, row, column] x[step, column]: `float32 [STEPS, ROWS]`.

    A step is a run of 4 WORDS bytes of prepacked weights (see `prepack`), or all columns whose
    nibbles are in them: 4 WORDS low ones and as many high ones, which lie 64 columns on.

    Args:
        weights: as from `_load_weights`.
        activations: as from `_quantize_steps`, of pointers `[STEPS]` to each step's first column.
        limit: `[STEPS]`, columns from the first one on that exist; 0 for an unused step.
        TILE: columns that share an activation scale, 32, 64 or 128; 0 for float activations.
    """
    packed, scale_low, scale_high = weights
    if TILE == 0:
        low_sum, high_sum = _dot_float(packed, activations[0], limit, WORDS)
        return low_sum * scale_low + high_sum * scale_high
    else:
        q_low, q_high, a_low, a_high = activations
        scale_low, scale_high = scale_low * a_low[:, None], scale_high * a_high[:, None]
        low = dot_bytes((packed << 4) & _UPPER_NIBBLES, q_low, tl.zeros(packed.shape, tl.int32))
        if TILE == 128 and GROUP == 128:  # one scale for both
            both = dot_bytes(packed & _UPPER_NIBBLES, q_high, low)
            return tl.sum(both, axis=2).to(tl.float32) * scale_low
        high = dot_bytes(packed & _UPPER_NIBBLES, q_high, tl.zeros(packed.shape, tl.int32))
        low_sum = tl.sum(low, axis=2).to(tl.float32)
        return low_sum * scale_low + tl.sum(high, axis=2).to(tl.float32) * scale_high


@triton.jit
def _decode_gate_up_kernel(
    x,
    w13,
    w13_scale,
    topk_ids,
    w2,
    inner,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    INNER: tl.constexpr,
    W2_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """silu(gate) * up of one pair and BLOCK_N (at most 64) of the INNER columns.

    x `[tokens, K]`, inner `[pairs, INNER]`. BLOCK_T tiles of 128 columns are loaded at once.
    PREFETCH (sm_90 and later) has the W2_BYTES of the expert's w2 brought into the L2 cache for the
    next kernel, which then is not bound by memory; memory would be idle between the two.
    """
    TILES: tl.constexpr = (K + 127) // 128
    WORDS: tl.constexpr = 16 if GROUP >= 64 else 8
    CHUNKS: tl.constexpr = 16 // WORDS
    # Are all activations loaded at once? Then they are quantized while the router runs.
    AT_ONCE: tl.constexpr = BLOCK_T >= TILES and TILE != 0
    pair = tl.program_id(1)
    step = tl.arange(0, BLOCK_T * CHUNKS)
    first = step // CHUNKS * 128 + step % CHUNKS * (WORDS * 4)
    x += pair // SLOTS * K
    if AT_ONCE:
        activations = _quantize_steps(x + first, K - first, TILE, WORDS)
    wait_for_previous()
    expert = tl.load(topk_ids + pair).to(tl.int64)
    if (expert < 0) | (expert >= EXPERTS):
        return
    column = tl.program_id(0) * BLOCK_N
    block = expert * (INNER // 64) + column // 64
    # Rows of the product: BLOCK_N of gate, then BLOCK_N of up.
    i = tl.arange(0, 2 * BLOCK_N)
    row = i // BLOCK_N * 64 + column % 64 + i % BLOCK_N
    words = w13.to(tl.pointer_type(tl.int32)) + block * (TILES * 2048)
    scales = w13_scale + block * (TILES * (128 // GROUP) * 128)
    if PREFETCH:
        SHARE: tl.constexpr = W2_BYTES // (INNER // BLOCK_N)
        prefetch(w2 + expert * W2_BYTES + tl.program_id(0) * SHARE, SHARE)
    acc = tl.zeros((2 * BLOCK_N,), tl.float32)
    for start in range(0, TILES, BLOCK_T):
        tile, chunk = start + step // CHUNKS, step % CHUNKS
        limit = K - start * 128 - first
        weights = _load_weights(
            words,
            (tile * 2048 + chunk * WORDS)[:, None] + (row * 16)[None, :],
            limit > 0,
            scales,
            (tile * (128 // GROUP) + chunk)[:, None] * 128 + row[None, :],
            64 // GROUP * 128,
            GROUP,
            WORDS,
        )
        if not AT_ONCE:
            activations = _quantize_steps(x + start * 128 + first, limit, TILE, WORDS)
        acc += tl.sum(_dot_steps(weights, activations, limit, GROUP, TILE, WORDS), axis=0)
    gate, up = acc.reshape(2, BLOCK_N).permute(1, 0).split()
    n = column + tl.arange(0, BLOCK_N)
    tl.store(inner + pair * INNER + n, (silu(gate) * up).to(inner.dtype.element_ty))


@triton.jit
def _decode_down_kernel(
    inner,
    w2,
    w2_scale,
    topk_weights,
    topk_ids,
    residual,
    out,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_UP: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Weighted sum over the slots of one token for BLOCK_N (at most 64) columns, plus the residual.

    inner `[pairs, K]`. The (slot, tile of 128 columns) pairs are one dimension, of which BLOCK_T
    are loaded at once; if these are all, they are before `inner` exists.
    """
    TILES: tl.constexpr = K // 128
    AT_ONCE: tl.constexpr = BLOCK_T >= SLOTS * TILES
    if not AT_ONCE:
        wait_for_previous()
    WORDS: tl.constexpr = 8 if GROUP == 32 or TILE == 32 else 16
    CHUNKS: tl.constexpr = 16 // WORDS
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    row = column % 64 + n
    words = w2.to(tl.pointer_type(tl.int32))
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, SLOTS * TILES, BLOCK_T):
        step = start * CHUNKS + tl.arange(0, BLOCK_T * CHUNKS)
        slot, tile, chunk = step // (TILES * CHUNKS), step // CHUNKS % TILES, step % CHUNKS
        pair = token * SLOTS + slot
        expert = tl.load(topk_ids + pair, mask=slot < SLOTS, other=-1).to(tl.int64)
        valid = (expert >= 0) & (expert < EXPERTS)
        block = (expert * (HIDDEN_UP // 64) + column // 64) * TILES + tile
        first = tile * 128 + chunk * (WORDS * 4)
        limit = tl.where(valid, K - first, 0)
        weight = tl.load(topk_weights + pair, mask=valid, other=0.0).to(tl.float32)
        weights = _load_weights(
            words,
            (block * 1024 + chunk * WORDS)[:, None] + (row * 16)[None, :],
            limit > 0,
            w2_scale,
            (block * (128 // GROUP) + chunk * WORDS * 4 // GROUP)[:, None] * 64 + row[None, :],
            64 // GROUP * 64,
            GROUP,
            WORDS,
        )
        if AT_ONCE:
            wait_for_previous()
        activations = _quantize_steps(inner + pair * K + first, limit, TILE, WORDS)
        products = _dot_steps(weights, activations, limit, GROUP, TILE, WORDS)
        acc += tl.sum(products * weight[:, None], axis=0)
    target = token * HIDDEN + column + n
    inside = column + n < HIDDEN
    if residual is not None:
        acc += tl.load(residual + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=inside)


def moe_decode(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group_size: int,
    residual: torch.Tensor | None,
    int8: bool,
) -> torch.Tensor:
    """`moe_w4a8` (int8) or `moe_w4a16` on prepacked weights, for few tokens."""
    tokens, hidden = x.shape
    slots = topk_ids.shape[1]
    experts, inner_blocks = w13.shape[:2]
    inner_dim, hidden_up = inner_blocks * 64, w2.shape[1] * 64
    table = "moe_w4a8" if int8 else "moe_w4a16"
    topk_ids = topk_ids.contiguous()

    inner = x.new_empty((tokens * slots, inner_dim), dtype=torch.float32 if int8 else x.dtype)
    config = tuned(f"{table}_decode_gate_up", tokens)
    config["BLOCK_T"] = min(config["BLOCK_T"], triton.next_power_of_2(cdiv(hidden, 128)))
    launch(
        _decode_gate_up_kernel,
        (inner_dim // config["BLOCK_N"], tokens * slots),
        x.contiguous(),
        w13,
        w13_scale,
        topk_ids,
        w2,
        inner,
        EXPERTS=experts,
        SLOTS=slots,
        K=hidden,
        INNER=inner_dim,
        W2_BYTES=hidden_up * inner_dim // 2,
        GROUP=group_size,
        TILE=ACTIVATION_TILE if int8 else 0,
        **config,
    )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = tuned(f"{table}_decode_down", tokens)
    steps = slots * inner_dim // 128
    config["BLOCK_T"] = min(config["BLOCK_T"], triton.next_power_of_2(steps))
    launch(
        _decode_down_kernel,
        (hidden_up // config["BLOCK_N"], tokens),
        inner,
        w2,
        w2_scale,
        topk_weights.contiguous(),
        topk_ids,
        None if residual is None else residual.contiguous(),
        out,
        EXPERTS=experts,
        SLOTS=slots,
        K=inner_dim,
        HIDDEN=hidden,
        HIDDEN_UP=hidden_up,
        GROUP=group_size,
        TILE=expert_activation_tile(inner_dim) if int8 else 0,
        **config,
    )
    return out
