"""Products of weights and a few activations, summed up in the lanes that hold them.

A step is a tile of 128 columns, whose INT4 weights are 64 bytes of a row (`layout.py`). Four lanes,
its quads, hold 16 bytes each. These are four words of four low and four high nibbles each; the high
nibbles lie 64 columns on. Along with the quads, the lanes of a warp hold LANES rows and 8 / LANES
steps; further steps are in other warps, and the rest in registers.

Of INT8 and float weights (BITS above 4) the two halves of a step lie behind each other. A quad has
the same 16 columns of each: of INT8 weights for INT8 activations four words, else 16 numbers.

Tensors of weights are `[ROWS / LANES, STEPS, LANES, QUADS, ...]`, those of activations
`[STEPS, LANES, QUADS, ...]`: the order of dimensions in which Triton gives them lanes and warps.
Activations that are loaded LANES times over are then in the lanes that need them, if there are
8 / LANES steps for each warp. Only what warps add up at the end goes through shared memory.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.int4 import (
    NIBBLE_SCALE,
    UPPER_NIBBLES,
    dot_bytes,
    dot_words,
)
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.cuda.triton.common.interpreter import is_interpreted

QUADS = tl.constexpr(4)
_WORDS = tl.constexpr(4)
# What round_to_int8 returns has the upper bits 0x4B400000. The sum of four of them, each shifted by
# one byte more, has 0x8B400000 too much. 0x80808080 is added so that no byte borrows from the next
# one, and is then taken from each byte again.
_BYTES_BIAS = tl.constexpr(-0x0ABF7F80)
_BYTES_SIGN = tl.constexpr(-0x7F7F7F80)


@triton.jit
def arange_rows(ROWS: tl.constexpr, LANES: tl.constexpr):
    """The row numbers 0 to ROWS - 1, `[ROWS / LANES, LANES]`."""
    return tl.arange(0, ROWS // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def place_column(n):
    """Where column n lies between the two kernels; the same words of four quads are contiguous."""
    return n // 64 * 64 + n // 4 % 4 * 16 + n // 16 % 4 * 4 + n % 4


@triton.jit
def _load_activations(x, limit, LANES: tl.constexpr, INNER: tl.constexpr):
    """Loads activations as `float32 [2, WORDS, STEPS, LANES, QUADS, 4]`.

    The first dimension is low and high nibbles, the last the bytes of a word.

    Args:
        x, limit: `[STEPS]`, a pointer to each step's first column, and how many columns exist from
            there on; the others count as 0.
        INNER: whether columns lie where `place_column` says.
    """
    half, word = tl.arange(0, 2)[:, None], tl.arange(0, _WORDS)[None, :]
    quad, byte = tl.arange(0, QUADS)[:, None], tl.arange(0, 4)[None, :]
    WORD: tl.constexpr = 16 if INNER else 4
    column = (half * 64 + word * WORD)[:, :, None, None, None, None]
    column = column + (quad * (64 // WORD) + byte)[None, None, None, None, :, :]
    column += tl.zeros((1, 1, 1, LANES, 1, 1), tl.int32)
    mask = column < limit[None, None, :, None, None, None]
    return tl.load(x[None, None, :, None, None, None] + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _find_tile_amax(x, TILE: tl.constexpr):
    """The largest magnitude in each quad's tile: `[2, STEPS, LANES, QUADS]`.

    Tiles from 64 columns on are common to all quads; the last dimension is 1 then.
    """
    amax = tl.max(tl.max(tl.abs(x), axis=5), axis=1)
    if TILE >= 64:
        amax = tl.max(amax, axis=3, keep_dims=True)
    else:
        STEPS: tl.constexpr = amax.shape[1]
        LANES: tl.constexpr = amax.shape[2]
        PAIRS: tl.constexpr = (2, STEPS, LANES, QUADS // 2, 2)
        amax = tl.max(amax.reshape(PAIRS), axis=4, keep_dims=True)
        amax = tl.broadcast_to(amax, PAIRS).reshape((2, STEPS, LANES, QUADS))
    if TILE == 128:
        amax = tl.broadcast_to(tl.max(amax, axis=0, keep_dims=True), amax.shape)
    return amax


@triton.jit
def quantize_steps(x, limit, TILE: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr):
    """Loads activations, as `_load_activations` does, and quantizes them for `dot_steps`.

    TILE is the number of columns that share a scale, 32, 64 or 128, or 0 for float activations.

    Returns:
        The int8 numbers for low and for high nibbles, four to an int32, each
        `[1, STEPS, LANES, QUADS, WORDS]`, and their scales, each
        `float32 [1, STEPS, LANES, QUADS or 1]`. With TILE 0, four times the floats.
    """
    x = _load_activations(x, limit, LANES, INNER)
    if TILE == 0:
        return x, x, x, x
    else:
        inverse, scale = compute_int8_scale(_find_tile_amax(x, TILE), TILE == 128)
        q = round_to_int8(x * inverse[:, None, :, :, :, None])
        q = tl.sum(q << (tl.arange(0, 4) * 8)[None, None, None, None, None, :], axis=5)
        # Only the low byte of each q counts; _BYTES_BIAS removes what the bits above it have added.
        q = (q + _BYTES_BIAS) ^ _BYTES_SIGN
        q_low, q_high = q.permute(2, 3, 4, 1, 0).split()
        a_low, a_high = scale[None, :, :, :, :].permute(0, 2, 3, 4, 1).split()
        return q_low[None, :, :, :, :], q_high[None, :, :, :, :], a_low, a_high


@triton.jit
def load_quantized(q, scale, valid, TILE: tl.constexpr, LANES: tl.constexpr):
    """Loads what `quantize_steps` would return, for LANES lanes, of activations that are quantized.

    Args:
        q, scale: `[STEPS]`, pointers to the first of each step's 128 numbers, int8, as one to
            int32, and to the first of its scales, one for each TILE columns.
        valid: `[STEPS]`, whether there are any; else they count as 0.
    """
    STEPS: tl.constexpr = q.shape[0]
    q, scale = q[None, :, None, None], scale[None, :, None, None]
    valid = valid[None, :, None, None]
    word = tl.arange(0, QUADS * _WORDS)[None, None, None, :]
    word = tl.broadcast_to(word, (1, STEPS, LANES, QUADS * _WORDS))
    low = tl.load(q + word, mask=valid, other=0)
    high = tl.load(q + (word + 16), mask=valid, other=0)
    # All lanes load the scales of their own columns, see `_load_nibbles`.
    tile = tl.arange(0, QUADS)[None, None, None, :] * 16 // TILE
    tile = tl.broadcast_to(tile, (1, STEPS, LANES, QUADS))
    a_low = tl.load(tl.max_contiguous(scale + tile, (1, 1, 1, 1)), mask=valid, other=0.0)
    a_high = a_low
    if TILE < 128:
        high_tile = tl.max_contiguous(scale + (tile + 64 // TILE), (1, 1, 1, 1))
        a_high = tl.load(high_tile, mask=valid, other=0.0)
    WORDS: tl.constexpr = (1, STEPS, LANES, QUADS, _WORDS)
    return low.reshape(WORDS), high.reshape(WORDS), a_low, a_high


@triton.constexpr_function
def count_row_units(bits: int, tile: int) -> int:
    """How much of what `point_to_units` points to a row has in a block of 128 columns."""
    return 4 * bits if bits == 4 or (bits == 8 and tile) else 128


@triton.jit
def point_to_units(weights, BITS: tl.constexpr, TILE: tl.constexpr):
    """A pointer to prepacked weights as one to words of int32, or to numbers where these are
    multiplied as floats."""
    if count_row_units(BITS, TILE) == 128:
        return weights
    else:
        return weights.to(tl.pointer_type(tl.int32))


@triton.jit
def load_weights(
    units,
    scales,
    block,
    valid,
    row,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Loads the weights of steps, and the scales of their halves.

    Args:
        units, scales: pointers to prepacked weights, as from `point_to_units`, and to their scales
            (`layout.py`), None for float weights.
        block, valid: `[STEPS]`, the block of ROWS rows and 128 columns that each step reads, and
            whether it does; else its weights count as zero. TILES blocks make up ROWS rows.
        row: `[ROWS / LANES, LANES]`, the rows to load of each block.

    Returns:
        The weights, and two scales, `float32 [ROWS / LANES, STEPS, LANES, QUADS]` or to be
        broadcast to it. INT4 weights are int32 `[ROWS / LANES, STEPS, LANES, QUADS * WORDS]`,
        others two such tensors of words, or of numbers, four times as many.
    """
    if BITS == 4:
        return _load_nibbles(units, scales, block, valid, row, ROWS, GROUP)
    else:
        HALF: tl.constexpr = count_row_units(BITS, TILE) // 2
        row, valid = row[:, None, :, None], valid[None, :, None, None]
        block = block[None, :, None, None]
        unit = tl.arange(0, HALF)[None, None, None, :]
        at = units + (block * (ROWS * 2 * HALF) + (row * (2 * HALF) + unit))
        halves = tl.load(at, mask=valid, other=0), tl.load(at + HALF, mask=valid, other=0)
        scale = tl.full((1, 1, 1, 1), 1.0, tl.float32)
        if BITS == 8:
            copies = row + tl.zeros((1, 1, 1, QUADS), tl.int32)
            source = tl.max_contiguous(scales + (block // TILES * ROWS + copies), (1, 1, 1, 1))
            scale = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        return halves, scale, scale


@triton.jit
def _load_nibbles(words, scales, block, valid, row, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """`load_weights` of INT4 weights: the scales are those of low and of high nibbles."""
    row, valid = row[:, None, :, None], valid[None, :, None, None]
    block = block[None, :, None, None]
    word = tl.arange(0, QUADS * _WORDS)[None, None, None, :]
    packed = tl.load(words + (block * (ROWS * 16) + (row * 16 + word)), mask=valid, other=0)
    # All lanes load the scales of their own weights. If Triton knew that the scales of rows are
    # contiguous, one lane would load several, and they would move through shared memory.
    group = (tl.arange(0, QUADS) * 16 // GROUP)[None, None, None, :]
    row = tl.max_contiguous(row, (1, 1, 1, 1))
    source = scales + ((block * (128 // GROUP) + group) * ROWS + row)
    low = tl.load(source, mask=valid, other=0.0).to(tl.float32) * NIBBLE_SCALE
    if GROUP == 128:
        return packed, low, low
    # Those of the high nibbles lie 64 // GROUP groups on.
    source += 64 // GROUP * ROWS
    return packed, low, tl.load(source, mask=valid, other=0.0).to(tl.float32) * NIBBLE_SCALE


@triton.jit
def _split_bit_reversed(x):
    """Splits the last of five dimensions, which is 4 long, into its parts 0, 2, 1 and 3."""
    even, odd = x.reshape((x.shape[0], x.shape[1], x.shape[2], x.shape[3], 2, 2)).split()
    return even.split() + odd.split()


@triton.jit
def _dot_float(packed, x):
    """Sums over a lane's columns of low and of high nibbles times float activations.

    Returns:
        `float32 [ROWS / LANES, STEPS, LANES, QUADS]` each, both times 16.
    """
    SHAPE: tl.constexpr = (1, x.shape[2], x.shape[3], QUADS * _WORDS, 4, 2)
    x_low, x_high = x.permute(2, 3, 4, 1, 5, 0).reshape(SHAPE).split()
    x_low, x_high = _split_bit_reversed(x_low), _split_bit_reversed(x_high)
    low = tl.zeros(packed.shape, tl.float32)
    high = tl.zeros(packed.shape, tl.float32)
    for i in tl.static_range(4):
        # 16 * the nibbles of a byte, sign-extended.
        byte = (packed << (24 - (i // 2 + i % 2 * 2) * 8)) >> 24
        low += ((byte << 28) >> 24).to(tl.float32) * x_low[i]
        high += (byte & -16).to(tl.float32) * x_high[i]
    WORDS: tl.constexpr = (packed.shape[0], packed.shape[1], packed.shape[2], QUADS, _WORDS)
    return tl.sum(low.reshape(WORDS), axis=4), tl.sum(high.reshape(WORDS), axis=4)


@triton.jit
def _extract_biased_low_nibbles(packed):
    """The low nibbles of the bytes of int32 words, each plus 8: with the top bit flipped."""
    if is_interpreted():
        return (packed ^ 0x08080808) & 0x0F0F0F0F
    # This is one instruction; the compiler would make two.
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x08080808, 0x0F0F0F0F, 0x28;",
        "=r,r",
        [packed],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _dot_int8(packed, q_low, q_high):
    """Sums over a lane's columns of low and of high nibbles times int8 activations.

    Returns:
        int32 `[ROWS / LANES, STEPS, LANES, QUADS]` each; the second is times 16.
    """
    WORDS: tl.constexpr = (packed.shape[0], packed.shape[1], packed.shape[2], QUADS, _WORDS)
    weights = _split_bit_reversed(packed.reshape(WORDS))
    q_low, q_high = _split_bit_reversed(q_low), _split_bit_reversed(q_high)
    low = tl.zeros(q_low[0].shape, tl.int32)
    high = tl.zeros(weights[0].shape, tl.int32)
    for i in tl.static_range(4):
        # -8 in each byte makes up for the 8 that the nibbles have too much.
        low = dot_bytes(q_low[i], tl.full(low.shape, -0x07070708, tl.int32), low)
    for i in tl.static_range(4):
        low = dot_bytes(_extract_biased_low_nibbles(weights[i]), q_low[i], low)
        high = dot_bytes(weights[i] & UPPER_NIBBLES, q_high[i], high)
    return low, high


@triton.jit
def _dot_words(halves, q_low, q_high):
    """Sums over a lane's columns of the two halves of INT8 weights times int8 activations.

    Returns:
        int32 `[ROWS / LANES, STEPS, LANES, QUADS]` each.
    """
    SHAPE: tl.constexpr = halves[0].shape
    WORDS: tl.constexpr = (SHAPE[0], SHAPE[1], SHAPE[2], QUADS, _WORDS)
    zero = tl.zeros((SHAPE[0], SHAPE[1], SHAPE[2], QUADS), tl.int32)
    w_low, w_high = halves
    w_low, w_high = w_low.reshape(WORDS), w_high.reshape(WORDS)
    low = dot_words(_split_bit_reversed(w_low), _split_bit_reversed(q_low), zero)
    return low, dot_words(_split_bit_reversed(w_high), _split_bit_reversed(q_high), zero)


@triton.jit
def _dot_numbers(halves, x):
    """The sum over a lane's columns of INT8 or float weights times float activations.

    Returns:
        `float32 [ROWS / LANES, STEPS, LANES, QUADS]`.
    """
    low, high = halves
    x_low, x_high = (
        x.permute(2, 3, 4, 1, 5, 0).reshape((1, low.shape[1], x.shape[3], low.shape[3], 2)).split()
    )
    products = low.to(tl.float32) * x_low + high.to(tl.float32) * x_high
    SHAPE: tl.constexpr = (low.shape[0], low.shape[1], low.shape[2], QUADS, low.shape[3] // QUADS)
    return tl.sum(products.reshape(SHAPE), axis=4)


@triton.jit
def dot_steps(weights, activations, GROUP: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """The sum of weight[row, column] x[column] over a lane's columns.

    Args:
        weights, activations: as from `load_weights` and `quantize_steps`.
        TILE: columns that share an activation scale, 32, 64 or 128; 0 for float activations.

    Returns:
        `float32 [ROWS / LANES, STEPS, LANES, QUADS]`.
    """
    if BITS == 4:
        return _dot_nibbles(weights, activations, GROUP, TILE)
    else:
        halves, scale, _ = weights
        q_low, q_high, a_low, a_high = activations
        if TILE == 0:
            products = _dot_numbers(halves, q_low)
        else:
            low, high = _dot_words(halves, q_low, q_high)
            if TILE == 128:
                products = (low + high).to(tl.float32) * a_low
            else:
                products = low.to(tl.float32) * a_low + high.to(tl.float32) * a_high
        return products * scale


@triton.jit
def _dot_nibbles(weights, activations, GROUP: tl.constexpr, TILE: tl.constexpr):
    """`dot_steps` of INT4 weights."""
    packed, scale_low, scale_high = weights
    q_low, q_high, a_low, a_high = activations
    if TILE == 0:
        low, high = _dot_float(packed, q_low)
    else:
        low, high = _dot_int8(packed, q_low, q_high)
        if TILE == 128 and GROUP == 128:  # one scale for both
            return (low * 16 + high).to(tl.float32) * a_low * scale_low
        low, high = low.to(tl.float32) * (16 * a_low), high.to(tl.float32) * a_high
    if GROUP == 128:
        return (low + high) * scale_low
    return low * scale_low + high * scale_high


@triton.jit
def sum_rows(products):
    """`float32 [ROWS]` from `[ROWS / LANES, STEPS, LANES, QUADS]`."""
    ROWS: tl.constexpr = products.shape[0] * products.shape[2]
    # The dimensions are summed one after the other. If a reshape joined them, lanes would hold the
    # result out of order, and Triton 3.6 adds it up wrongly across warps. The one that lies within
    # a warp comes first; else warps exchange four times as much, and registers run out.
    return tl.sum(tl.sum(products, axis=3), axis=1).reshape(ROWS)
