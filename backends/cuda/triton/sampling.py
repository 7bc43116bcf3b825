"""Sampling of the next token in two launches; the contract is `ops.sample`.

The first kernel reduces blocks of the vocabulary: the largest logit, or, where nothing is cut off,
the largest logit plus noise. The second, one program, finishes. What top-k and top-p keep is an
upper set of the logits, so nothing needs to be sorted:

1. Tokens that surely are not kept are dropped: below the k-th largest of the blocks' maxima, or so
   far below the maximum that all of them together weigh less than 1 - top_p.
2. Top-k: bisection on the bits of the k-th largest logit, counting.
3. Top-p: the token with the largest logit plus noise is the result if the weight of larger logits
   is below top_p. If not, no token with a smaller logit is kept either: the next candidate is the
   best among the larger ones. The first candidate is kept with a probability of about top_p.

The temperature is read by the kernels: one CUDA graph serves greedy decoding and sampling.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.compile_case import CompileCase
from et_moe.backends.cuda.triton.launch import cdiv, launch

BLOCK = 1024
TILE = 4096


@triton.jit
def _gumbel(token, position, seed):
    """Noise of int32 token ids, see `ops.sampling.gumbel`."""
    zero = tl.zeros_like(token)
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    word, _, _, _ = tl.philox(seed, token, low, zero, zero)
    u = ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 16777216.0)
    return -tl.log(-tl.log(u))


@triton.jit
def _first_max(values, ids):
    """The largest value and the lowest of the ids that have it."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _is_filtered(top_k, top_p, V):
    return ((top_k > 0) & (top_k < V)) | (top_p < 1.0)


@triton.jit
def _block_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    seed,
    position,
    block_value,
    block_id,
    block_sum,
    V,
    BLOCK: tl.constexpr,
):
    """Per block of the vocabulary: the largest logit / temperature and the lowest id that has it,
    with noise where sampling keeps all tokens; and the sum of exp(l - largest l)."""
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + token, mask=token < V, other=float("-inf"))
    t = tl.load(temperature)
    if t > 0.0:
        value = tl.div_rn(value, tl.broadcast_to(t, value.shape))
        if not _is_filtered(tl.load(top_k), tl.load(top_p), V):
            value += _gumbel(token, tl.load(position), tl.load(seed))
    best, best_id = _first_max(value, token)
    tl.store(block_value + block, best)
    tl.store(block_id + block, best_id)
    reference = tl.where(best == float("-inf"), 0.0, best)
    tl.store(block_sum + block, tl.sum(tl.exp(value - reference), axis=0))


@triton.jit
def _key(value):
    """int32 that is ordered like the float (of zeros, -0 equals +0)."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(values, count, k, TILE: tl.constexpr):
    """Key of the k-th largest of `count` values; 1 <= k <= count."""
    low = tl.full((), -(2**31), tl.int64)  # at least k values have this key or a larger one
    high = tl.full((), 2**31, tl.int64)  # fewer than k have
    while high - low > 1:
        middle = (low + high) >> 1
        larger = tl.zeros((TILE,), tl.int32)
        for start in range(0, count, TILE):
            i = start + tl.arange(0, TILE)
            key = _key(tl.load(values + i, mask=i < count, other=0.0))
            larger += ((i < count) & (key.to(tl.int64) >= middle)).to(tl.int32)
        if tl.sum(larger, axis=0) >= k:
            low = middle
        else:
            high = middle
    return low.to(tl.int32)


@triton.jit
def _collect(logits, temperature, bound, kept, kept_id, V, TILE: tl.constexpr):
    """Writes l = logits / temperature of tokens whose key is at least `bound`, ids rising."""
    count = tl.zeros((), tl.int32)
    for start in range(0, V, TILE):
        token = start + tl.arange(0, TILE)
        value = tl.load(logits + token, mask=token < V, other=0.0)
        value = tl.div_rn(value, tl.broadcast_to(temperature, value.shape))
        keep = (token < V) & (_key(value) >= bound)
        place = count + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(kept + place, value, mask=keep)
        tl.store(kept_id + place, token, mask=keep)
        count += tl.sum(keep.to(tl.int32), axis=0)
    return count


@triton.jit
def _next_candidate(kept, kept_id, count, bound, maximum, position, seed, TILE: tl.constexpr):
    """Among tokens with a key of at least `bound`: the one with the largest l + noise, as (id, l),
    and the sum of exp(l - maximum)."""
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), 0x7FFFFFFF, tl.int32)
    best_value = tl.full((), float("-inf"), tl.float32)
    weight = tl.zeros((TILE,), tl.float32)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        value = tl.load(kept + i, mask=i < count, other=float("-inf"))
        token = tl.load(kept_id + i, mask=i < count, other=0)
        inside = (i < count) & (_key(value) >= bound)
        weight += tl.where(inside, tl.exp(value - maximum), 0.0)
        noisy = tl.where(inside, value + _gumbel(token, position, seed), float("-inf"))
        tile_best, tile_id = _first_max(noisy, tl.where(inside, token, 0x7FFFFFFF))
        if (tile_best > best) | (best_id == 0x7FFFFFFF):
            best, best_id = tile_best, tile_id
            best_value = tl.max(tl.where(inside & (token == tile_id), value, float("-inf")), axis=0)
    return best_id, best_value, tl.sum(weight, axis=0)


@triton.jit
def _finish_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    seed,
    position,
    block_value,
    block_id,
    block_sum,
    kept,
    kept_id,
    out,
    V,
    BLOCKS,
    PADDED_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token, from the blocks' results; one program. kept, kept_id are scratch, `[V]`."""
    b = tl.arange(0, PADDED_BLOCKS)
    value = tl.load(block_value + b, mask=b < BLOCKS, other=float("-inf"))
    ids = tl.load(block_id + b, mask=b < BLOCKS, other=0x7FFFFFFF)
    maximum, token = _first_max(value, ids)
    t, k, p = tl.load(temperature), tl.load(top_k), tl.load(top_p)
    if (t > 0.0) & _is_filtered(k, p, V):
        sums = tl.load(block_sum + b, mask=b < BLOCKS, other=0.0)
        total = tl.sum(tl.where(b < BLOCKS, sums * tl.exp(value - maximum), 0.0), axis=0)
        by_k = (k > 0) & (k < V)
        bound = tl.full((), -(2**31), tl.int32)
        if by_k & (k <= BLOCKS):
            bound = _kth_largest(block_value, BLOCKS, k, PADDED_BLOCKS)
        if p < 1.0:
            # V exp(-d) = (1 - p) total, less a margin for rounding.
            distance = tl.log(V / ((1.0 - p) * total)) + 1.0
            bound = tl.maximum(bound, _key(maximum - tl.maximum(distance, 1.0)))
        count = _collect(logits, t, bound, kept, kept_id, V, TILE)
        tl.debug_barrier()
        if by_k:
            bound = _kth_largest(kept, count, tl.minimum(k, count), TILE)
        place, noise_seed = tl.load(position), tl.load(seed)
        token, candidate, weight = _next_candidate(
            kept, kept_id, count, bound, maximum, place, noise_seed, TILE
        )
        if p < 1.0:
            if by_k:
                total = weight
            larger = _key(candidate) + 1
            better, next_candidate, weight = _next_candidate(
                kept, kept_id, count, larger, maximum, place, noise_seed, TILE
            )
            while (weight >= p * total) & (weight > 0.0):
                token = better
                larger = _key(next_candidate) + 1
                better, next_candidate, weight = _next_candidate(
                    kept, kept_id, count, larger, maximum, place, noise_seed, TILE
                )
    # Logits that are not numbers must not become an id out of range.
    tl.store(out, tl.minimum(token, V - 1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """`ops.sample` in two launches: `int64 [1, 1]`."""
    vocabulary = logits.shape[1]
    blocks = cdiv(vocabulary, BLOCK)
    arguments = (logits.contiguous(), temperature, top_k, top_p, seed, position)
    block_value = logits.new_empty((blocks,), dtype=torch.float32)
    block_id = logits.new_empty((blocks,), dtype=torch.int32)
    block_sum = torch.empty_like(block_value)
    launch(
        _block_kernel,
        (blocks,),
        *arguments,
        block_value,
        block_id,
        block_sum,
        vocabulary,
        BLOCK=BLOCK,
        num_warps=4,
    )
    out = logits.new_empty((1, 1), dtype=torch.int64)
    launch(
        _finish_kernel,
        (1,),
        *arguments,
        block_value,
        block_id,
        block_sum,
        logits.new_empty((vocabulary,), dtype=torch.float32),
        logits.new_empty((vocabulary,), dtype=torch.int32),
        out,
        vocabulary,
        blocks,
        PADDED_BLOCKS=triton.next_power_of_2(blocks),
        TILE=TILE,
        num_warps=32,
    )
    return out


def compile_cases() -> list[CompileCase]:
    """Sampling from the vocabulary of Qwen3.5."""

    def arguments(m, device):
        return {
            "logits": torch.randn((1, 248320), device=device) * 4,
            "temperature": torch.full((1,), 0.6, device=device),
            "top_k": torch.full((1,), 20, dtype=torch.int64, device=device),
            "top_p": torch.full((1,), 0.95, device=device),
            "seed": torch.full((1,), 42, dtype=torch.int64, device=device),
            "position": torch.full((1,), m, dtype=torch.int64, device=device),
        }

    return [CompileCase("sample", sample, arguments, tokens=(1,))]


def tune_candidates() -> dict[str, list[dict]]:
    """Nothing to tune."""
    return {}
