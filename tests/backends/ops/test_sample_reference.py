"""Sampling: the random numbers, the distribution, and what truncation keeps."""

import math

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.ops.sampling import gumbel, philox

MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4x32-10 as the paper writes it, on integers of any size."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


# Known answers of the Random123 distribution (kat_vectors): counter, key, result.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected) -> None:
    """They check the function above, which also covers the counter words that sampling leaves at
    0."""
    assert philox4x32(counter, key) == expected


def test_philox() -> None:
    assert philox(torch.tensor([0]), 0, 0).item() == 0x6627E8D5
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 1 << 32, (100,), generator=generator)
    counters[:3] = torch.tensor([0, MASK, 1 << 31])
    for position in (0, 1, 4095, MASK):
        for seed in (0, 1, -1, 42, 1 << 32, (1 << 63) - 1, -(1 << 63)):
            key = (seed & MASK, (seed >> 32) & MASK)
            expected = [philox4x32((c, position, 0, 0), key)[0] for c in counters.tolist()]
            assert philox(counters, position, seed).tolist() == expected


def test_gumbel() -> None:
    """The noise is finite at both ends of u, and has the mean and variance of the distribution."""
    noise = gumbel(200_000, 3, 5, torch.device("cpu"))
    assert noise.isfinite().all() and noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for u in (0.5 * 2.0**-24, 1 - 0.5 * 2.0**-24):
        assert math.isfinite(-math.log(-math.log(u)))


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0) -> int:
    token = ops.sample(
        torch.as_tensor(logits, dtype=torch.float32)[None],
        torch.tensor([temperature]),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
        torch.tensor([seed]),
        torch.tensor([position]),
    )
    assert token.shape == (1, 1) and token.dtype == torch.int64
    return token.item()


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    total = sum(counts)
    return sum(
        (c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True)
    )


LOGITS = [0.3, -1.0, 2.0, 1.2, 0.0, 1.9, -0.5, 0.8]


@pytest.mark.parametrize("temperature", [0.9, 2.0])
def test_distribution_over_seeds_and_positions(temperature: float) -> None:
    """Tokens follow softmax(logits / temperature). Chi-square with 7 degrees of freedom is larger
    than 24.3 with a probability of 0.1%."""
    probabilities = (torch.tensor(LOGITS) / temperature).softmax(-1).tolist()
    for over in ("seed", "position"):
        counts = [0] * len(LOGITS)
        for i in range(1500):
            counts[draw(LOGITS, temperature, **{over: i})] += 1
        assert chi_square(counts, probabilities) < 24.3, (over, counts)


def test_neighbouring_positions_are_independent() -> None:
    """Draws at positions p and p + 1 are counted as pairs. Chi-square with 8 degrees of freedom is
    larger than 26.1 with a probability of 0.1%."""
    logits = [0.0, 0.5, 1.0]
    single = torch.tensor(logits).softmax(-1)
    tokens = [draw(logits, seed=9, position=p) for p in range(2000)]
    counts = [0] * 9
    for first, second in zip(tokens[::2], tokens[1::2], strict=True):
        counts[3 * first + second] += 1
    assert chi_square(counts, torch.outer(single, single).flatten().tolist()) < 26.1, counts


def test_truncated_distribution() -> None:
    """Top-k of 3 and top-p renormalize what is left. Chi-square with 2 degrees of freedom is larger
    than 13.8 with a probability of 0.1%."""
    kept = {2: 2.0, 5: 1.9, 3: 1.2}
    probabilities = torch.tensor(list(kept.values())).softmax(-1).tolist()
    for truncation in ({"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.75}):
        counts = dict.fromkeys(kept, 0)
        for seed in range(1000):
            # A KeyError means that a wrong token was drawn.
            counts[draw(LOGITS, seed=seed, **truncation)] += 1
        assert chi_square(list(counts.values()), probabilities) < 13.8, (truncation, counts)


def expected_token(logits: torch.Tensor, temperature, top_k, top_p, seed, position) -> int:
    """The contract of `sample`, word by word."""
    scaled = (logits / temperature).tolist()
    kept = set(range(len(scaled)))
    if top_k > 0:
        kept = {i for i in kept if sum(other > scaled[i] for other in scaled) < top_k}
    if top_p < 1:
        total = sum(math.exp(scaled[i]) for i in kept)

        def larger(i: int) -> float:
            return sum(math.exp(scaled[j]) for j in kept if scaled[j] > scaled[i]) / total

        kept = {i for i in kept if larger(i) < top_p}
    key = (seed & MASK, (seed >> 32) & MASK)
    best, token = -math.inf, -1
    for i in sorted(kept):
        u = ((philox4x32((i, position, 0, 0), key)[0] >> 8) + 0.5) * 2.0**-24
        noisy = scaled[i] - math.log(-math.log(u))
        if noisy > best:
            best, token = noisy, i
    return token


def test_against_the_contract() -> None:
    """Draws agree for random logits with many ties, every kind of truncation, and any seed."""
    generator = torch.Generator().manual_seed(1)
    options = [(k, p) for k in (0, 1, 2, 5, 30, 100) for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)]
    for i, (top_k, top_p) in enumerate(options * 8):
        logits = torch.randn(30, generator=generator) * 3
        if i % 2:
            logits = logits.round()
        temperature = (0.3, 1.0, 1.7)[i % 3]
        seed = int(torch.randint(-(1 << 62), 1 << 62, (1,), generator=generator))
        expected = expected_token(logits, temperature, top_k, top_p, seed, i)
        assert draw(logits, temperature, top_k, top_p, seed, i) == expected, i


def test_equal_logits_stay_together() -> None:
    """Top-k of 1 keeps both of the two largest, and top-p does not separate them either."""
    logits = [1.0, 3.0, 0.0, 3.0]
    for truncation in ({"top_k": 1}, {"top_p": 0.1}, {"top_k": 1, "top_p": 1e-9}):
        assert {draw(logits, seed=s, **truncation) for s in range(40)} == {1, 3}


def test_greedy() -> None:
    """The token with the largest logit is taken, and of equal ones that with the lowest id.
    Truncation and seed do not matter."""
    assert draw([0.0, 2.0, 2.0, 1.0], temperature=0.0, seed=3) == 1
    assert draw([-1.0, -1.0], temperature=0.0) == 0
    assert draw([float("-inf"), -3.0], temperature=0.0, top_k=1, top_p=0.1) == 1
    generator = torch.Generator().manual_seed(2)
    for seed in range(50):
        logits = torch.randn(1000, generator=generator)
        assert draw(logits, 0.0, seed=seed) == logits.argmax().item()
        assert draw(logits, 1.0, top_k=1, seed=seed) == logits.argmax().item()


def test_a_draw_depends_on_seed_position_and_logits_alone() -> None:
    first = [draw(LOGITS, seed=s, position=p) for s in range(20) for p in range(20)]
    assert first == [draw(LOGITS, seed=s, position=p) for s in range(20) for p in range(20)]
    # A token's noise does not depend on how many tokens follow it in the vocabulary.
    longer = [*LOGITS, float("-inf"), -1e9]
    assert first == [draw(longer, seed=s, position=p) for s in range(20) for p in range(20)]
