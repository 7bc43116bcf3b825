"""Sampling of the next token, reproducible on every backend."""

import torch

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.sequences import rows_each, sequence_rows

_MASK = 0xFFFFFFFF


def philox(counter: torch.Tensor, position: int, seed: int) -> torch.Tensor:
    """First 32-bit word of Philox 4x32-10 (Salmon et al., "Parallel Random Numbers", SC 2011).

    Counter words (counter, position, 0, 0), key words (low, high) of the 64-bit seed.

    Args:
        counter: `int64 [N]` in 0..2^32-1. Returns `int64 [N]` in 0..2^32-1.
    """
    c0, c1 = counter & _MASK, torch.full_like(counter, position & _MASK)
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK

    def multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        # 32 x 32 -> 64 bits in int64: split b so that no partial product overflows the sign.
        low = a * (b & 0xFFFF)
        mid = a * (b >> 16) + (low >> 16)
        return (mid >> 16) & _MASK, ((mid << 16) | (low & 0xFFFF)) & _MASK

    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def gumbel(vocabulary: int, position: int, seed: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise `float32 [V]`: -log(-log(min(philox >> 8 + 0.5, 2^24 - 1) / 2^24)).

    In float32 the largest number of 24 bits plus 0.5 is 2^24, whose noise would be infinite.
    """
    words = philox(torch.arange(vocabulary, device=device), position, seed)
    u = ((words >> 8).float() + 0.5).clamp(max=2.0**24 - 1) * 2.0**-24
    return -torch.log(-torch.log(u))


def _sample_fake(logits, temperature, top_k, top_p, seed, positions):
    sequences = positions.shape[0]
    each = rows_each(logits.shape[0], sequences)
    return logits.new_empty((sequences, each), dtype=torch.int64)


@declare(_sample_fake)
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Draws the token behind each row of B sequences by Gumbel-max with counter-based noise.

    Row r of a sequence lies at its position + r and is drawn with the sequence's parameters, as it
    is drawn alone.

    l = logits / temperature. Top-k keeps token i if fewer than k tokens have a larger l (equal
    ones stay together). Top-p then keeps i if the kept tokens with a larger l have a probability
    of less than top_p in all. The result is argmax(l + gumbel), ties to the lowest id.

    Args:
        logits: `float32 [B R, V]`, see `sequences.py`.
        temperature: `float32 [B]`, at least 0; 0 is greedy (argmax, ties to the lowest id).
        top_k: `int64 [B]`, 0 keeps all. top_p: `float32 [B]` in (0, 1], 1 keeps all.
        seed: `int64 [B]`. positions: `int64 [B]`, of each sequence's first row, that is, of the
            token before the one drawn: the noise is a function of seed, position and token id
            alone.

    Returns:
        `int64 [B, R]`.

    Raises:
        ValueError: the rows are no multiple of the sequences.
    """
    parameters = list(zip(temperature, top_k, top_p, seed, positions, strict=True))
    return torch.cat(
        [
            torch.cat([_draw(logits[first + r].float(), *parameters[b], r) for r in range(each)], 1)
            for b, first, each in sequence_rows(logits.shape[0], len(parameters), None)
        ]
    )


def _draw(row, temperature, top_k, top_p, seed, position, offset) -> torch.Tensor:
    """The token of one row, `int64 [1, 1]`. row: `float32 [V]`; the others are scalars, and the row
    lies at position + offset."""
    if float(temperature) == 0.0:
        return row.argmax().reshape(1, 1)
    scaled = row / temperature.float()
    order, index = scaled.sort(descending=True, stable=True)
    # Of equal values all count as large as the first of them.
    first = torch.searchsorted(-order, -order, right=False)
    keep = torch.ones_like(order, dtype=torch.bool)
    if int(top_k) > 0:
        keep &= first < int(top_k)
    if float(top_p) < 1.0:
        probability = order.masked_fill(~keep, float("-inf")).softmax(-1)
        larger = torch.cat((probability.new_zeros(1), probability.cumsum(-1)))[first]
        keep &= larger < float(top_p)
    kept = torch.zeros_like(keep).scatter_(0, index, keep)
    noisy = scaled + gumbel(row.numel(), int(position) + offset, int(seed), row.device)
    return noisy.masked_fill(~kept, float("-inf")).argmax().reshape(1, 1)
