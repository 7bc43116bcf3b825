"""Products of INT4 weights and a few activations, summed up where they are: in lanes.

A step is a tile of 128 columns, whose weights are 64 bytes of a row (see `prepack`). Four lanes,
its quads, hold 16 bytes each: four words, each of four low and of four high nibbles, which lie 64
columns on. The other lanes of a warp hold LANES rows and 8 / LANES steps, the warps further
steps, and registers the rest. Tensors of weights, `[ROWS / LANES, STEPS, LANES, QUADS, ...]`,
and of activations, `[STEPS, LANES, QUADS, ...]`, have their dimensions in the order in which Triton
then gives lanes and warps to them. So activations that are loaded LANES times over are in the lanes
that need them (if there are 8 / LANES steps for each warp), and through shared memory goes only
what warps add up at the end.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.int4 import NIBBLE_SCALE, UPPER_NIBBLES, dot_bytes
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.cuda.triton.common.interpreter import is_interpreted

QUADS = tl.constexpr(4)
_WORDS = tl.constexpr(4)
# The upper bits of what round_int8 returns are 0x4B400000, those of four of them shifted and added
# 0x8B400000; 0x80808080 is added to avoid borrows, and taken from each byte again.
_BYTES_BIAS = tl.constexpr(-0x0ABF7F80)
_BYTES_SIGN = tl.constexpr(-0x7F7F7F80)


@triton.jit
def rows_of(ROWS: tl.constexpr, LANES: tl.constexpr):
    """0 to ROWS, `[ROWS / LANES, LANES]`."""
    return tl.arange(0, ROWS // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def inner_position(n):
    """Where column n is kept between the kernels: the same word of four quads is contiguous."""
    return n // 64 * 64 + n // 4 % 4 * 16 + n // 16 % 4 * 4 + n % 4


@triton.jit
def _load_activations(x, limit, LANES: tl.constexpr, INNER: tl.constexpr):
    """`float32 [2, WORDS, STEPS, LANES, QUADS, 4]` (2: low and high nibbles).

    Args:
        x, limit: `[STEPS]`, pointers to each step's first column, and how many columns from there
            on exist; the others are 0.
        INNER: whether columns are in the order of `inner_position`.
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
def _tile_amax(x, TILE: tl.constexpr):
    """Largest magnitude of each quad's tile, `[2, STEPS, LANES, QUADS or 1]`."""
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
    """Activations of low and high nibbles, see `_load_activations`, as `dot_steps` takes them.

    Returns:
        int8, four in an int32, `[1, STEPS, LANES, QUADS, WORDS]` each, and their scales,
        `float32 [1, STEPS, LANES, QUADS or 1]` each. For TILE 0 the floats instead of all these.
    """
    x = _load_activations(x, limit, LANES, INNER)
    if TILE == 0:
        return x, x, x, x
    else:
        inverse, scale = compute_int8_scale(_tile_amax(x, TILE), TILE == 128)
        q = round_to_int8(x * inverse[:, None, :, :, :, None])
        q = tl.sum(q << (tl.arange(0, 4) * 8)[None, None, None, None, None, :], axis=5)
        # Of each q only the low byte was meant: as if that were unsigned, less what is above it.
        q = (q + _BYTES_BIAS) ^ _BYTES_SIGN
        q_low, q_high = q.permute(2, 3, 4, 1, 0).split()
        a_low, a_high = scale[None, :, :, :, :].permute(0, 2, 3, 4, 1).split()
        return q_low[None, :, :, :, :], q_high[None, :, :, :, :], a_low, a_high


@triton.jit
def load_weights(
    words,
    scales,
    block,
    valid,
    row,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weights of steps, int32 `[ROWS / LANES, STEPS, LANES, QUADS, WORDS]`, and their scales.

    Args:
        words, scales: prepacked weights, as int32 words, and scales (see `prepack`).
        block, valid: `[STEPS]`, which block of ROWS rows and a tile of columns; what is not valid
            counts as zero.
        row: `[ROWS / LANES, LANES]`, rows of the block.
    """
    row, valid = row[:, None, :, None], valid[None, :, None, None]
    block = block[None, :, None, None]
    word = tl.arange(0, QUADS * _WORDS)[None, None, None, :]
    packed = tl.load(words + (block * (ROWS * 16) + (row * 16 + word)), mask=valid, other=0)
    # All lanes load the scales of their weights. Triton must not know that those of rows are
    # contiguous: it would load several by one lane, and move them through shared memory.
    group = (tl.arange(0, QUADS) * 16 // GROUP)[None, None, None, :]
    row = tl.max_contiguous(row, (1, 1, 1, 1))
    source = scales + ((block * (128 // GROUP) + group) * ROWS + row)
    low = tl.load(source, mask=valid, other=0.0).to(tl.float32) * NIBBLE_SCALE
    if GROUP == 128:
        return packed, low, low
    # The high nibbles are 64 // GROUP groups on.
    source += 64 // GROUP * ROWS
    return packed, low, tl.load(source, mask=valid, other=0.0).to(tl.float32) * NIBBLE_SCALE


@triton.jit
def _quarters(x):
    """The four parts of the last of five dimensions, in the order 0, 2, 1, 3."""
    even, odd = x.reshape((x.shape[0], x.shape[1], x.shape[2], x.shape[3], 2, 2)).split()
    return even.split() + odd.split()


@triton.jit
def _dot_float(packed, x):
    """Products of low and of high nibbles with float activations, as `dot_steps` adds them up."""
    SHAPE: tl.constexpr = (1, x.shape[2], x.shape[3], QUADS * _WORDS, 4, 2)
    x_low, x_high = x.permute(2, 3, 4, 1, 5, 0).reshape(SHAPE).split()
    x_low, x_high = _quarters(x_low), _quarters(x_high)
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
def _biased_low_nibbles(packed):
    """The low nibbles of int32 words, plus 8: with the top bit flipped they are not negative."""
    if is_interpreted():
        return (packed ^ 0x08080808) & 0x0F0F0F0F
    # One instruction, of which the compiler makes two.
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
    """Products of low and of high nibbles with int8 activations: sums over the words of a lane.

    Returns:
        int32 `[ROWS / LANES, STEPS, LANES, QUADS]` each, the second one times 16.
    """
    WORDS: tl.constexpr = (packed.shape[0], packed.shape[1], packed.shape[2], QUADS, _WORDS)
    weights, q_low, q_high = _quarters(packed.reshape(WORDS)), _quarters(q_low), _quarters(q_high)
    low = tl.zeros(q_low[0].shape, tl.int32)
    high = tl.zeros(weights[0].shape, tl.int32)
    for i in tl.static_range(4):
        low = dot_bytes(q_low[i], tl.full(low.shape, -0x07070708, tl.int32), low)  # times -8
    for i in tl.static_range(4):
        low = dot_bytes(_biased_low_nibbles(weights[i]), q_low[i], low)
        high = dot_bytes(weights[i] & UPPER_NIBBLES, q_high[i], high)
    return low, high


@triton.jit
def dot_steps(weights, activations, GROUP: tl.constexpr, TILE: tl.constexpr):
    """sum over a lane's columns of weight[row, column] x[column].

    Args:
        weights, activations: as from `load_weights` and `quantize_steps`.
        TILE: columns that share an activation scale, 32, 64 or 128; 0 for float activations.

    Returns:
        `float32 [ROWS / LANES, STEPS, LANES, QUADS]`.
    """
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
    # One dimension after the other: across warps, Triton 3.6 adds up wrongly what a reshape has put
    # together of several dimensions, if lanes then hold it out of order. First the one that lies
    # within a warp: else what warps exchange is four times as much, and Triton 3.6 runs out of
    # registers.
    return tl.sum(tl.sum(products, axis=3), axis=1).reshape(ROWS)
