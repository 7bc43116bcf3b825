"""Sampling of the next token of each sequence in three launches, without sorting the vocabulary.

The tokens that top-k and top-p keep are all those whose logit is above some bound, so it is enough
to find the bound.

1. The first kernel reduces blocks of the vocabulary to the largest logit or, where all tokens are
   kept, to the largest logit plus noise.
2. The second kernel collects the tokens that may be kept. It drops those below the k-th largest of
   the maxima of groups, and those so far below the maximum that all of them together weigh less
   than 1 - top_p.
3. The third kernel, one program, finds the k-th largest logit by bisection on its bits. For top-p,
   the token with the largest logit plus noise is the result if the larger logits together weigh
   less than top_p. If not, no token with a smaller logit is kept either, and the next candidate is
   the best of those with larger logits. The first candidate is kept with a probability of about
   top_p.

The kernels read the temperature, so one CUDA graph serves greedy decoding and sampling. Tokens are
collected in any order, on which nothing depends; weights are added as integers. Rows share nothing
but the parameters of their sequence: program id 1, in the third kernel 0, is the row, and pointers
are advanced to it first.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.float_order import to_order_key
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.tokens import find_sequence
from et_moe.backends.ops.sequences import rows_each

BLOCK = 1024
GROUP = 128
TILE = 1024
ONE = tl.constexpr(2**40)
"""Weights exp(l - maximum) are added as integers in units of 1 / ONE."""


@triton.jit
def _draw_gumbel(token, position, seed):
    """The noise of int32 token ids, as `ops.sampling.gumbel` defines it: fp32 of their shape."""
    zero = tl.zeros_like(token)
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    word, _, _, _ = tl.philox(seed, token, low, zero, zero)
    u = tl.minimum((word >> 8).to(tl.int32).to(tl.float32) + 0.5, 16777215.0) * (1.0 / 16777216.0)
    return -tl.log(-tl.log(u))


@triton.jit
def _find_first_max(values, ids):
    """The largest value, and the lowest of the ids that have it."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _is_filtered(top_k, top_p, V):
    """Whether top-k or top-p may drop any of V tokens."""
    return ((top_k > 0) & (top_k < V)) | (top_p < 1.0)


@triton.jit
def _find_kth_largest(values, count, k, TILE: tl.constexpr):
    """The key of the k-th largest of `count` values, 1 <= k <= count."""
    within = tl.arange(0, TILE)
    # The first tile, which is mostly all there is, stays in registers.
    first = to_order_key(tl.load(values + within, mask=within < count, other=0.0)).to(tl.int64)
    low = tl.full((), -(2**31), tl.int64)  # at least k values have this key or a larger one
    high = tl.full((), 2**31, tl.int64)  # fewer than k have
    while high - low > 1:
        middle = (low + high) >> 1
        larger = ((within < count) & (first >= middle)).to(tl.int32)
        for start in range(TILE, count, TILE):
            i = start + within
            key = to_order_key(tl.load(values + i, mask=i < count, other=0.0)).to(tl.int64)
            larger += ((i < count) & (key >= middle)).to(tl.int32)
        if tl.sum(larger, axis=0) >= k:
            low = middle
        else:
            high = middle
    return low.to(tl.int32)


@triton.jit
def _block_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    seed,
    positions,
    block_value,
    block_id,
    block_sum,
    group_value,
    count,
    V,
    BLOCKS,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Reduces one block of the vocabulary, with l = logit / temperature, or the logit for 0.

    It stores the largest l, plus noise where all tokens are kept, the lowest id that has it, the
    sum of exp(l - largest l), and the largest l of each group of the block. The first program of a
    row sets its count to 0.
    """
    wait_for_previous()
    block = tl.program_id(0)
    row = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * V + token, mask=token < V, other=float("-inf"))
    sequence, offset = find_sequence(row, TOKENS)
    t = tl.load(temperature + sequence)
    if t > 0.0:
        value = tl.div_rn(value, tl.broadcast_to(t, value.shape))
        if not _is_filtered(tl.load(top_k + sequence), tl.load(top_p + sequence), V):
            position = tl.load(positions + sequence) + offset
            value += _draw_gumbel(token, position, tl.load(seed + sequence))
    best, best_id = _find_first_max(value, token)
    GROUPS: tl.constexpr = BLOCK // GROUP
    block += row * BLOCKS
    tl.store(block_value + block, best)
    tl.store(block_id + block, best_id)
    reference = tl.where(best == float("-inf"), 0.0, best)
    tl.store(block_sum + block, tl.sum(tl.exp(value - reference), axis=0))
    largest = tl.max(tl.reshape(value, (GROUPS, GROUP)), axis=1)
    tl.store(group_value + block * GROUPS + tl.arange(0, GROUPS), largest)
    if tl.program_id(0) == 0:
        tl.store(count + row, 0)


@triton.jit
def _sum_weights(block_value, block_sum, BLOCKS, PADDED_BLOCKS: tl.constexpr):
    """The largest l of the vocabulary, and the sum of exp(l - largest l)."""
    b = tl.arange(0, PADDED_BLOCKS)
    value = tl.load(block_value + b, mask=b < BLOCKS, other=float("-inf"))
    sums = tl.load(block_sum + b, mask=b < BLOCKS, other=0.0)
    maximum = tl.max(value, axis=0)
    return maximum, tl.sum(tl.where(b < BLOCKS, sums * tl.exp(value - maximum), 0.0), axis=0)


@triton.jit
def _collect_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    seed,
    positions,
    block_value,
    block_sum,
    group_value,
    kept,
    kept_noisy,
    kept_id,
    count,
    V,
    BLOCKS,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Appends l, l + noise and id of those tokens of one block that may be kept."""
    wait_for_previous()
    row = tl.program_id(1)
    sequence, offset = find_sequence(row, TOKENS)
    t, k = tl.load(temperature + sequence), tl.load(top_k + sequence)
    p = tl.load(top_p + sequence)
    block_value += row * BLOCKS
    block_sum += row * BLOCKS
    group_value += row * BLOCKS * (BLOCK // GROUP)
    first = row.to(tl.int64) * V
    if (t > 0.0) & _is_filtered(k, p, V):
        maximum, total = _sum_weights(block_value, block_sum, BLOCKS, PADDED_BLOCKS)
        groups = BLOCKS * (BLOCK // GROUP)
        bound = tl.full((), -(2**31), tl.int32)
        if (k > 0) & (k <= groups):
            bound = _find_kth_largest(group_value, groups, k, PADDED_GROUPS)
        if p < 1.0:
            # V exp(-d) = (1 - p) total, plus a margin for rounding.
            distance = tl.log(V / ((1.0 - p) * total)) + 1.0
            bound = tl.maximum(bound, to_order_key(maximum - tl.maximum(distance, 1.0)))
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + first + token, mask=token < V, other=0.0)
        value = tl.div_rn(value, tl.broadcast_to(t, value.shape))
        keep = (token < V) & (to_order_key(value) >= bound)
        amount = tl.sum(keep.to(tl.int32), axis=0)
        if amount > 0:
            place = tl.atomic_add(count + row, amount) + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            place += first
            position = tl.load(positions + sequence) + offset
            noisy = value + _draw_gumbel(token, position, tl.load(seed + sequence))
            tl.store(kept + place, value, mask=keep)
            tl.store(kept_noisy + place, noisy, mask=keep)
            tl.store(kept_id + place, token, mask=keep)


@triton.jit
def _find_candidate(kept, kept_noisy, kept_id, count, bound, maximum, TILE: tl.constexpr):
    """Of collected tokens with a key of at least `bound`, finds the one with the largest l + noise.

    Returns:
        Its id, its l, and the weight of all these tokens.
    """
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0x7FFFFFFF, tl.int32)
    best_value = tl.full((), float("-inf"), tl.float32)
    weight = tl.zeros((TILE,), tl.int64)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        value = tl.load(kept + i, mask=i < count, other=float("-inf"))
        noisy = tl.load(kept_noisy + i, mask=i < count, other=float("-inf"))
        token = tl.load(kept_id + i, mask=i < count, other=0x7FFFFFFF)
        inside = (i < count) & (to_order_key(value) >= bound)
        weight += tl.where(inside, tl.exp(value - maximum) * ONE, 0.0).to(tl.int64)
        noisy = tl.where(inside, noisy, float("-inf"))
        tile_best, tile_id = _find_first_max(noisy, tl.where(inside, token, 0x7FFFFFFF))
        if (tile_best > best) | ((tile_best == best) & (tile_id < best_id)):
            best, best_id = tile_best, tile_id
            best_value = tl.max(tl.where(inside & (token == tile_id), value, float("-inf")), axis=0)
    return best_id, best_value, tl.sum(weight, axis=0).to(tl.float32) * (1.0 / ONE)


@triton.jit
def _finish_kernel(
    temperature,
    top_k,
    top_p,
    block_value,
    block_id,
    block_sum,
    kept,
    kept_noisy,
    kept_id,
    count,
    out,
    V,
    BLOCKS,
    PADDED_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Chooses the token from the blocks' maxima, or with top-k or top-p from those collected."""
    wait_for_previous()
    row = tl.program_id(0)
    first = row.to(tl.int64) * V
    block_value += row * BLOCKS
    block_id += row * BLOCKS
    block_sum += row * BLOCKS
    kept += first
    kept_noisy += first
    kept_id += first
    b = tl.arange(0, PADDED_BLOCKS)
    value = tl.load(block_value + b, mask=b < BLOCKS, other=float("-inf"))
    ids = tl.load(block_id + b, mask=b < BLOCKS, other=0x7FFFFFFF)
    _, token = _find_first_max(value, ids)
    sequence, _ = find_sequence(row, TOKENS)
    t, k = tl.load(temperature + sequence), tl.load(top_k + sequence)
    p = tl.load(top_p + sequence)
    if (t > 0.0) & _is_filtered(k, p, V):
        maximum, total = _sum_weights(block_value, block_sum, BLOCKS, PADDED_BLOCKS)
        n = tl.load(count + row)
        bound = tl.full((), -(2**31), tl.int32)
        if (k > 0) & (k < n):
            bound = _find_kth_largest(kept, n, k, TILE)
        token, chosen, weight = _find_candidate(kept, kept_noisy, kept_id, n, bound, maximum, TILE)
        if p < 1.0:
            if (k > 0) & (k < V):
                total = weight
            better, next_chosen, weight = _find_candidate(
                kept, kept_noisy, kept_id, n, to_order_key(chosen) + 1, maximum, TILE
            )
            while (weight >= p * total) & (weight > 0.0):
                token = better
                better, next_chosen, weight = _find_candidate(
                    kept, kept_noisy, kept_id, n, to_order_key(next_chosen) + 1, maximum, TILE
                )
    # Logits that are not numbers must not become an id out of range.
    tl.store(out + row, tl.minimum(token, V - 1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`ops.sample` in three launches.

    Args:
        logits: `float32 [B R, V]`.
        temperature, top_p: `float32 [B]`. top_k, seed, positions: `int64 [B]`.

    Returns:
        `int64 [B, R]`.
    """
    (rows, vocabulary), sequences = logits.shape, positions.shape[0]
    tokens = rows_each(rows, sequences)

    def scratch(size, dtype=torch.float32):
        return logits.new_empty((rows, size), dtype=dtype)

    blocks = cdiv(vocabulary, BLOCK)
    groups = blocks * (BLOCK // GROUP)
    arguments = (logits.contiguous(), temperature, top_k, top_p, seed, positions)
    block_value, block_id, block_sum = (
        scratch(blocks),
        scratch(blocks, torch.int32),
        scratch(blocks),
    )
    group_value, count = scratch(groups), scratch(1, torch.int32)
    launch(
        _block_kernel,
        (blocks, rows),
        *arguments,
        block_value,
        block_id,
        block_sum,
        group_value,
        count,
        vocabulary,
        blocks,
        BLOCK=BLOCK,
        GROUP=GROUP,
        TOKENS=tokens,
        num_warps=4,
    )
    kept = (scratch(vocabulary), scratch(vocabulary), scratch(vocabulary, torch.int32), count)
    sizes = {"PADDED_BLOCKS": triton.next_power_of_2(blocks)}
    launch(
        _collect_kernel,
        (blocks, rows),
        *arguments,
        block_value,
        block_sum,
        group_value,
        *kept,
        vocabulary,
        blocks,
        **sizes,
        PADDED_GROUPS=triton.next_power_of_2(groups),
        BLOCK=BLOCK,
        GROUP=GROUP,
        TOKENS=tokens,
        num_warps=4,
    )
    out = logits.new_empty((sequences, tokens), dtype=torch.int64)
    launch(
        _finish_kernel,
        (rows,),
        *(temperature, top_k, top_p, block_value, block_id, block_sum),
        *kept,
        out,
        vocabulary,
        blocks,
        **sizes,
        TILE=TILE,
        TOKENS=tokens,
        num_warps=8,
    )
    return out
