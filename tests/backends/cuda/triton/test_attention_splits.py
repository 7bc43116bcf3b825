"""Attention of a few tokens behind many, whose cache is divided into splits."""

import pytest
import torch
from test_attention import TOLERANCE, check, clone, counted, make_inputs

from et_moe.backends.cuda.triton.attention import prefill
from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.cases.launches import record_launches

# KV heads, query heads per KV head, D, rotated pairs, capacity
SHAPE = (2, 2, 32, 4, 320)


@pytest.fixture(autouse=True)
def _many_splits(reconfigure, monkeypatch):
    """Splits of 32 tokens, eight of them, two tiles of keys each until there are more tokens."""
    reconfigure("attention_prefill", BLOCK_M=16, BLOCK_N=16, STAGES=1, num_warps=4)
    monkeypatch.setattr(prefill, "SPLIT_TOKENS", 32)
    monkeypatch.setattr(prefill, "MAX_SPLITS", 8)


def launched(inputs: dict) -> list[str]:
    with record_launches(run=True) as recorded:
        attention(**clone(inputs))
    return [launch.kernel.__name__ for launch in recorded]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("position", [0, 1, 31, 32, 90, 111, 112, 239, 240, 280])
@pytest.mark.parametrize("tokens", [2, 16, 17, 40])
def test_positions(tokens, position, dtype, device):
    """The last rows begin splits that hide all of their tokens from the rows before; from 256
    tokens on splits are longer than the least."""
    check(make_inputs(SHAPE, tokens, position, dtype, device))


@pytest.mark.parametrize("tokens,valid", [(40, 0), (40, 1), (40, 16), (40, 33)])
def test_padding(tokens, valid, device):
    """Padded rows may hold anything, and come out as zeros."""
    inputs = make_inputs(SHAPE, tokens, 250, torch.float32, device)
    check(inputs, valid)
    inputs["qkv"][valid:] = float("nan")
    out = attention(**counted(inputs, valid))
    assert torch.count_nonzero(out[valid:]) == 0 and torch.isfinite(out).all()


@pytest.mark.parametrize("position,first", [(0, 1), (70, 1), (70, 40), (5, 40), (100, 111)])
def test_first_token(position, first, device):
    """A row of `test_attention.py` alone sees all tokens; here the first of them are hidden."""
    inputs = make_inputs(SHAPE, 40, position, torch.float32, device)
    together = attention(**clone(inputs), first_token=first)
    for row in (0, 17, 39):
        alone = clone(inputs)
        attention(**alone)  # for its cache
        alone["qkv"] = inputs["qkv"][row : row + 1].clone()
        alone["positions"] = inputs["positions"] + row
        expected = attention(**alone, first_token=first)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-6)
        assert bool(expected.any()) == (position + row >= first)


def test_what_no_split_has_written_is_not_read(device, monkeypatch):
    inputs = make_inputs(SHAPE, 20, 40, torch.float32, device)
    expected, empty = attention(**clone(inputs)), torch.Tensor.new_empty

    def garbage(tensor, *size, **options):
        found = empty(tensor, *size, **options)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", garbage)
    assert torch.equal(attention(**clone(inputs)), expected)


def test_which_calls_have_splits(device, monkeypatch):
    few = make_inputs(SHAPE, prefill.FEW_TOKENS, 0, torch.float32, device)
    assert launched(few) == ["_append_kernel", "_flash_kernel", "combine_kernel"]
    more = make_inputs(SHAPE, prefill.FEW_TOKENS + 1, 0, torch.float32, device)
    assert launched(more) == ["_append_kernel", "_flash_kernel"]
    monkeypatch.setattr(prefill, "SPLIT_TOKENS", SHAPE[4])
    assert launched(few) == ["_append_kernel", "_flash_kernel"]
