"""Sampling against its eager reference."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.sampling import op as sampling


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    # Many tiles and blocks at a small vocabulary: the interpreter's time is that of the loops.
    monkeypatch.setattr(sampling, "TILE", 256)
    monkeypatch.setattr(sampling, "BLOCK", 128)
    monkeypatch.setattr(sampling, "GROUP", 32)


def draw(function, logits, temperature, top_k=0, top_p=1.0, seed=0, position=0) -> int:
    device = logits.device
    scalars = (
        torch.tensor([temperature], dtype=torch.float32, device=device),
        torch.tensor([top_k], device=device),
        torch.tensor([top_p], dtype=torch.float32, device=device),
        torch.tensor([seed], device=device),
        torch.tensor([position], device=device),
    )
    return int(function(logits, *scalars))


def check(logits, temperature, **options):
    with record_launches(run=True) as launches:
        got = draw(sampling.sample, logits, temperature, **options)
    assert len(launches) == 3
    assert got == draw(ops.sample, logits, temperature, **options)


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1000, 2049])
def test_greedy(vocabulary, device):
    logits = torch.randn(1, vocabulary, device=device)
    check(logits, 0.0, top_k=3, top_p=0.5)
    check(torch.zeros_like(logits), 0.0)
    logits[0, vocabulary // 2 :] = 7.0  # a tie over several blocks
    check(logits, 0.0)


@pytest.mark.parametrize("seed", [1, 2**32 + 5, 2**63 - 1, -3])
def test_plain(seed, device):
    logits = torch.randn(1, 1000, device=device) * 3
    for position in (0, 1, 4095, 2**33 + 1):
        check(logits, 0.8, seed=seed, position=position)


@pytest.mark.parametrize("top_k", [1, 3, 8, 9, 50, 999, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_top_k(top_k, temperature, device):
    logits = torch.randn(1, 1000, device=device) * 3
    for seed in range(2):
        check(logits, temperature, top_k=top_k, seed=seed)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_top_p(top_p, temperature, device):
    logits = torch.randn(1, 1000, device=device) * 3
    for seed in range(2):
        check(logits, temperature, top_p=top_p, seed=seed)


@pytest.mark.parametrize("top_k,top_p", [(20, 0.95), (5, 0.3), (300, 0.8), (1, 0.01)])
def test_both(top_k, top_p, device):
    logits = torch.randn(1, 1000, device=device) * 2
    for seed in range(3):
        check(logits, 0.9, top_k=top_k, top_p=top_p, seed=seed, position=seed * 7)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.4}, {"top_k": 300, "top_p": 0.9}])
def test_equal_logits_stay_together(options, device):
    logits = torch.randint(0, 4, (1, 700), device=device).float()
    logits[0, ::5] *= -0.0
    for seed in range(2):
        check(logits, 1.0, seed=seed, **options)


def test_masked_logits(device):
    logits = torch.full((1, 400), float("-inf"), device=device)
    logits[0, 300:310] = torch.randn(10, device=device)
    for options in ({}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 200, "top_p": 0.7}):
        check(logits, 1.0, **options)


def test_invalid_logits_do_not_leave_the_vocabulary(device):
    logits = torch.full((1, 300), float("nan"), device=device)
    for temperature in (0.0, 1.0):
        assert 0 <= draw(sampling.sample, logits, temperature, top_k=5, top_p=0.5) < 300


def test_noise_is_finite(device, monkeypatch):
    """The random number of token 186077 is the largest that there is, at this seed and position."""
    monkeypatch.setattr(sampling, "BLOCK", 8192)
    logits = torch.zeros(1, 186_100, device=device)
    logits[0, 5] = 40.0
    assert draw(sampling.sample, logits, 1.0, seed=2, position=14) == 5
    assert draw(sampling.sample, logits, 1.0, top_k=2, seed=2, position=14) == 5


def test_noise_is_philox(device):
    """With equal logits the distribution is uniform, and the draw is a function of the seed."""
    logits = torch.zeros(1, 64, device=device)
    drawn = [draw(sampling.sample, logits, 1.0, seed=s) for s in range(30)]
    assert drawn == [draw(ops.sample, logits, 1.0, seed=s) for s in range(30)]
    assert len(set(drawn)) > 15


# temperature, top_k, top_p, seed and position of each row of a batch
ROWS = (
    *((0.0, 0, 1.0, 0, 3), (1.0, 0, 1.0, 1, 0), (0.7, 20, 0.95, 2, 2**33 + 1)),
    *((3.0, 5, 1.0, -3, 4095), (1.0, 0, 0.3, 4, 9), (1.0, 0, 0.3, 4, 9), (1.5, 300, 0.8, 5, 1)),
)


def test_rows(device):
    """Each row is drawn with its own parameters, as it is alone and among others."""
    logits = torch.randn(len(ROWS), 1000, device=device) * 2
    logits[5] = logits[4]
    dtypes = (torch.float32, torch.int64, torch.float32, torch.int64, torch.int64)
    values = zip(*ROWS, strict=True)
    parameters = [
        torch.tensor(v, dtype=t, device=device) for v, t in zip(values, dtypes, strict=True)
    ]
    with record_launches(run=True) as launches:
        got = sampling.sample(logits, *parameters)
    assert len(launches) == 3
    assert got.shape == (len(ROWS), 1) and got.dtype == torch.int64
    assert torch.equal(got, ops.sample(logits, *parameters)) and got[4] == got[5]
    order = [3, 6, 0, 5]
    assert torch.equal(sampling.sample(logits[order], *(p[order] for p in parameters)), got[order])
    for b in range(len(ROWS)):
        row = slice(b, b + 1)
        assert sampling.sample(logits[row], *(p[row] for p in parameters)) == got[b]


def test_rows_of_sequences(device):
    """Each row of a sequence is drawn with its parameters, as it is drawn alone at its position."""
    each, vocabulary = 3, 1000
    logits = torch.randn(each * len(ROWS), vocabulary, device=device) * 2
    dtypes = (torch.float32, torch.int64, torch.float32, torch.int64, torch.int64)
    values = zip(*ROWS, strict=True)
    parameters = [
        torch.tensor(v, dtype=t, device=device) for v, t in zip(values, dtypes, strict=True)
    ]
    got = sampling.sample(logits, *parameters)
    assert got.shape == (len(ROWS), each) and got.dtype == torch.int64
    assert torch.equal(got, ops.sample(logits, *parameters))
    for r in range(each):
        own = logits.view(len(ROWS), each, vocabulary).select(1, r).contiguous()
        alone = sampling.sample(own, *parameters[:-1], parameters[-1] + r)
        assert torch.equal(alone.flatten(), got.select(1, r))
