"""The CPU kernel of sampling draws the reference's tokens."""

import itertools

import pytest
import torch
from op_harness import Harness, normal, reference


def _sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    position: int = 0,
) -> list:
    return [
        logits,
        torch.tensor([temperature]),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
        torch.tensor([seed]),
        torch.tensor([position]),
    ]


def _together(calls: list[list]) -> list:
    """One call for the sequences of several."""
    return [torch.cat(values) for values in zip(*calls, strict=True)]


def test_same_tokens_for_all_parameters(harness: Harness) -> None:
    logits = normal(1, 300, seed=1) * 3
    parameters = itertools.product((0.3, 1.0, 2.5), (0, 1, 7, 299, 300, 5000), (0.05, 0.6, 1.0))
    calls = [
        _sample(logits, *values, seed=seed, position=seed * 3)
        for values in parameters
        for seed in range(12)
    ]
    harness.compare("sample", calls)


def test_same_tokens_for_many_seeds_and_positions(harness: Harness) -> None:
    logits = normal(1, 2000, seed=2)
    calls = [_sample(logits, seed=seed, position=7) for seed in range(200)]
    calls += [_sample(logits, position=position) for position in range(200)]
    calls += [_sample(logits, seed=s, position=2**40) for s in (-1, -(2**63), 2**63 - 1, 2**35)]
    harness.compare("sample", calls)


def test_same_tokens_with_a_large_vocabulary(harness: Harness) -> None:
    logits = normal(1, 20_001, seed=3) * 2
    calls = [
        _sample(logits, top_k=k, top_p=p, seed=seed)
        for k, p in ((0, 1.0), (0, 0.9), (50, 0.9), (50, 1.0))
        for seed in range(10)
    ]
    harness.compare("sample", calls)


def test_each_sequence_has_its_own_parameters(harness: Harness) -> None:
    """Greedy, filtered and plain sequences side by side, few of them and many."""
    parameters = itertools.product((0.0, 0.7, 1.0), (0, 3), (0.8, 1.0), (5, 9))
    calls = [
        _sample(normal(1, 1500, seed=i) * 2, temperature, top_k, top_p, seed, position=i)
        for i, (temperature, top_k, top_p, seed) in enumerate(parameters)
    ]
    batches = [calls[:1], calls[5:7], calls, calls * 3]
    harness.compare("sample", [_together(batch) for batch in batches])


def test_noise_is_finite(harness: Harness) -> None:
    """The random number of token 186077 is the largest that there is, at this seed and position."""
    logits = torch.zeros(1, 186_100)
    logits[0, 5] = 40.0
    call = _sample(logits, seed=2, position=14)
    harness.compare("sample", [call])
    assert int(reference("sample", call)[0]) == 5


def test_greedy_and_ties(harness: Harness) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0, -1.0]])
    calls = [_sample(logits, 0.0), _sample(-logits, 0.0)]
    # Equal logits are kept together, by top-k and by top-p.
    calls += [_sample(logits, top_k=1, seed=seed) for seed in range(20)]
    calls += [_sample(logits, top_p=0.1, seed=seed) for seed in range(20)]
    harness.compare("sample", calls)
    drawn = {int(reference("sample", args)[0]) for args in calls[2:]}
    assert drawn == {1, 3, 4}


def test_masked_and_extreme_logits(harness: Harness) -> None:
    logits = normal(1, 50, seed=4)
    logits[0, ::2] = float("-inf")
    extreme = torch.tensor([[3e38, -3e38, 3e38, 0.0]])
    calls = [
        _sample(logits, top_k=k, top_p=p, seed=s)
        for k in (0, 40)
        for p in (0.9, 1.0)
        for s in range(5)
    ]
    harness.compare("sample", calls)
    harness.compare("sample", [_sample(extreme, temperature) for temperature in (0.0, 1.0, 1e-3)])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -0.5}, "temperature: expected a finite number of at least 0, got -0.5"),
        (
            {"temperature": float("nan")},
            "temperature: expected a finite number of at least 0, got nan",
        ),
        (
            {"temperature": float("inf")},
            "temperature: expected a finite number of at least 0, got inf",
        ),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
        ({"top_p": float("nan")}, "top_p: expected a number above 0 and at most 1, got nan"),
    ],
)
def test_refuses_parameters(harness: Harness, parameters: dict, message: str) -> None:
    args = _together([_sample(normal(1, 9)), _sample(normal(1, 9), **parameters)])
    harness.refuse("sample", args, f"et_moe::sample: {message} of sequence 1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_broken_logits(harness: Harness, value: float) -> None:
    logits = normal(1, 9)
    logits[0, 4] = value
    args = _together([_sample(normal(1, 9)), _sample(logits), _sample(normal(1, 9))])
    message = f"logits: token 4 of sequence 1 has {value}"
    harness.refuse("sample", args, f"et_moe::sample: {message}")
