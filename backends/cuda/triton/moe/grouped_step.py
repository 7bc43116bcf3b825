"""One step along K of the experts' grouped GEMMs (`prefill.py`)."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.int4 import (
    NIBBLE_SCALE,
    extract_high_nibbles,
    extract_low_nibbles,
)
from et_moe.backends.cuda.triton.common.interpreter import is_interpreted


@triton.constexpr_function
def _count_step_bytes(group: int, tile: int) -> int:
    """Bytes per step of a row of the weight.

    The low nibbles of a step must share a group and a tile of activations, and so must the high
    ones.
    """
    return 32 if group == 32 or tile == 32 else 64


@triton.constexpr_function
def _count_step_columns(tile: int, bits: int) -> int:
    """Columns per step of a weight that is not INT4: those that share an activation scale, else
    what is 128 bytes of float weights."""
    return tile or min(64, 1024 // bits)


@triton.constexpr_function
def count_steps(k: int, group: int, tile: int, bits: int) -> int:
    """How many steps k columns take, for the kernels' GROUP, TILE and BITS."""
    if bits == 4:
        return (k + 127) // 128 * (64 // _count_step_bytes(group, tile))
    return (k + 127) // 128 * (128 // _count_step_columns(tile, bits))


@triton.jit
def _load_weight_scales(
    rows,
    odd,
    step,
    STRIDE: tl.constexpr,
    TYPE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Loads the scales, fp32 `[ROWS]` each, of the low and of the high nibbles of a step.

    Args:
        rows: `[ROWS]`, pointers to the int32 that hold the scales of a row and of its neighbour,
            STRIDE apart from group to group. An asynchronous copy has four bytes at least, and only
            such loads are pipelined.
        odd: `[ROWS]`, whether a row's scale is the upper half.
        TYPE: of a scale, bfloat16 or float16.
    """
    STEP: tl.constexpr = _count_step_bytes(GROUP, TILE)
    CHUNKS: tl.constexpr = 64 // STEP
    group = step // CHUNKS * (128 // GROUP) + step % CHUNKS * STEP // GROUP
    low = _select_half(tl.load(rows + group * STRIDE), odd, TYPE)
    if GROUP == 128:
        return low, low
    return low, _select_half(tl.load(rows + (group + 64 // GROUP) * STRIDE), odd, TYPE)


@triton.jit
def _select_half(pair, upper, TYPE: tl.constexpr):
    """The upper or the lower bf16 or fp16 of an int32, as fp32."""
    if tl.float16 == TYPE:
        half = tl.where(upper, pair >> 16, pair).to(tl.int16)
        return half.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(upper, pair & -0x10000, pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_x(x_rows, x_used, column, K: tl.constexpr):
    """Loads activations `[BLOCK_M, columns]`; unused rows and columns from K on give 0."""
    mask = x_used[:, None]
    if K % 128 != 0:
        mask &= (column < K)[None, :]
    return tl.load(x_rows[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def _multiply(w, x, acc):
    """acc (or None) + w x^T of floats, or w x^T of int8 numbers; fp32 in both cases."""
    if x.dtype == tl.int8:
        return tl.dot(w, x.trans(), out_dtype=tl.int32).to(tl.float32)
    else:
        TYPE: tl.constexpr = tl.float32 if is_interpreted() else x.dtype
        return tl.dot(w.to(TYPE), x.to(TYPE).trans(), acc=acc, input_precision="ieee")


@triton.jit
def _add_numbers(
    acc,
    step,
    x_rows,
    x_used,
    x_scale_rows,
    weight_rows,
    K: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`add_grouped_step` of INT8 or float weights; blocks of columns are WEIGHT_STRIDE numbers
    apart."""
    STEP: tl.constexpr = _count_step_columns(TILE, BITS)
    CHUNKS: tl.constexpr = 128 // STEP
    block = step // CHUNKS
    within = step % CHUNKS * STEP + tl.arange(0, STEP)
    w = tl.load(weight_rows[:, None] + (block * WEIGHT_STRIDE + within)[None, :])
    x = _load_x(x_rows, x_used, block * 128 + within, K)
    if TILE == 0:
        return _multiply(w, x, acc)
    else:
        a = tl.load(x_scale_rows + step * X_SCALE_STRIDE, mask=x_used, other=0.0)
        return acc + _multiply(w, x, None) * a[None, :]


@triton.jit
def _add_nibbles(
    acc,
    step,
    x_rows,
    x_used,
    x_scale_rows,
    weight_rows,
    scales,
    K: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """`add_grouped_step` of INT4 weights; `scales` of the step, as from `_load_weight_scales`.

    Blocks of columns are WEIGHT_STRIDE bytes apart.
    """
    STEP: tl.constexpr = _count_step_bytes(GROUP, TILE)
    CHUNKS: tl.constexpr = 64 // STEP
    block = step // CHUNKS
    within = step % CHUNKS * STEP + tl.arange(0, STEP)
    packed = tl.load(weight_rows[:, None] + (block * WEIGHT_STRIDE + within)[None, :])
    packed = packed.to(tl.int8, bitcast=True)
    low, high = extract_low_nibbles(packed), extract_high_nibbles(packed)
    weight_low = (scales[0] * NIBBLE_SCALE)[:, None]
    weight_high = (scales[1] * NIBBLE_SCALE)[:, None]
    if TILE != 0:
        tile = block * (128 // TILE) + step % CHUNKS * STEP // TILE
        a_rows = x_scale_rows + tile * X_SCALE_STRIDE
        a_low = tl.load(a_rows, mask=x_used, other=0.0)[None, :]
    if GROUP == 128 and TILE == 128:
        # Both nibbles share their scales, so one product has twice as many columns.
        both = tl.join(low, high).permute(0, 2, 1).reshape(low.shape[0], 128)
        x = _load_x(x_rows, x_used, block * 128 + tl.arange(0, 128), K)
        return acc + _multiply(both, x, None) * (weight_low * a_low)
    x_low = _load_x(x_rows, x_used, block * 128 + within, K)
    x_high = _load_x(x_rows, x_used, block * 128 + 64 + within, K)
    d_low = _multiply(low, x_low, None)
    if GROUP == 128 and TILE == 0:
        return acc + _multiply(high, x_high, d_low) * weight_low
    d_high = _multiply(high, x_high, None)
    if TILE != 0:
        a_high = a_low
        if TILE != 128:
            a_rows += 64 // TILE * X_SCALE_STRIDE
            a_high = tl.load(a_rows, mask=x_used, other=0.0)[None, :]
        d_low, d_high = d_low * a_low, d_high * a_high
    if GROUP == 128:
        return acc + (d_low + d_high) * weight_low
    return acc + d_low * weight_low + d_high * weight_high


@triton.jit
def add_grouped_step(
    acc,
    step,
    x_rows,
    x_used,
    x_scale_rows,
    weight_rows,
    weight_scale,
    pairs,
    odd,
    K: tl.constexpr,
    X_SCALE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """acc + the sum of weight[n, k] x[m, k] over the columns of a step, `float32 [ROWS, BLOCK_M]`.

    INT8 weights count without their scales, which `scale_rows` multiplies with the whole sum.

    Args:
        x_rows, x_used: `[BLOCK_M]`, pointers to rows of K activations, and which of them to read.
            The others count as zeros; to read any row instead, many blocks would read the same.
        x_scale_rows: `[BLOCK_M]`, pointers to the rows' scales, one per TILE (32, 64 or 128)
            columns, X_SCALE_STRIDE apart. With TILE 0, activations are floats without scales.
        weight_rows: pointers to each row in its first block of 128 columns, which is 64 bytes of
            INT4 weights (BITS 4), else 128 numbers. A block has ROWS rows.
        weight_scale: a pointer, of whose type the scales of INT4 weights are.
        pairs, odd: of INT4 weights, as `_load_weight_scales` takes them.
    """
    if BITS == 4:
        TYPE: tl.constexpr = weight_scale.dtype.element_ty
        scales = _load_weight_scales(pairs, odd, step, ROWS // 2, TYPE, GROUP, TILE)
        return _add_nibbles(
            *(acc, step, x_rows, x_used, x_scale_rows, weight_rows, scales),
            *(K, X_SCALE_STRIDE, ROWS * 64, GROUP, TILE),
        )
    else:
        return _add_numbers(
            *(acc, step, x_rows, x_used, x_scale_rows, weight_rows),
            *(K, X_SCALE_STRIDE, ROWS * 128, BITS, TILE),
        )


@triton.jit
def scale_rows(acc, scales):
    """acc `[ROWS, BLOCK_M]` times the scales of its rows, of INT8 weights, at `[ROWS]` pointers."""
    return acc * tl.load(scales).to(tl.float32)[:, None]
