"""The second product's weights of one token, whose slots and tiles are one dimension."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.moe.decode_dot import load_weights, point_to_units


@triton.jit
def load_slot_weights(
    w2,
    w2_scale,
    topk_weights,
    topk_ids,
    token,
    start,
    column,
    row,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
    HIDDEN_UP: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Loads the weights of BLOCK_T steps from `start` on; a step is a slot's tile of 128 columns.

    Args:
        topk_weights, topk_ids: `[tokens, SLOTS]`.
        column: the first of the program's columns of out, of which `row` has those within a block.

    Returns:
        What `load_weights` returns, with the routing weights in the scales; and `[BLOCK_T]` of the
        steps the pair, the tile, and whether its id is that of an expert.
    """
    step = start + tl.arange(0, BLOCK_T)
    slot, tile = step // TILES, step % TILES
    pair = token * SLOTS + slot
    expert = tl.load(topk_ids + pair, mask=slot < SLOTS, other=-1).to(tl.int64)
    valid = (expert >= 0) & (expert < EXPERTS)
    block = (expert * (HIDDEN_UP // 64) + column // 64) * TILES + tile
    weight = tl.load(topk_weights + pair, mask=valid, other=0.0).to(tl.float32)
    weight = weight[None, :, None, None]
    units = point_to_units(w2, BITS, TILE)
    values, low, high = load_weights(
        units, w2_scale, block, valid, row, 64, TILES, GROUP, BITS, TILE
    )
    return (values, low * weight, high * weight), pair, tile, valid
