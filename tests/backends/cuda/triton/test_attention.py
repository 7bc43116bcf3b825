"""Attention kernels against their eager reference."""

import pytest
import torch
import triton
import triton.language as tl
from sequences import make_pages, read_cache

from et_moe.backends import ops
from et_moe.backends.cuda.triton.attention import decode
from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.attention.rope import sincos
from et_moe.backends.cuda.triton.cases.launches import record_launches

# The relative L2 error that is allowed.
TOLERANCE = {
    torch.float32: 2e-6 if triton.knobs.runtime.interpret else 1e-4,
    torch.bfloat16: 5e-3,
}
# KV heads, query heads per KV head, D, rotated pairs, capacity
ONE_KV, GROUP_3, FULL_ROPE = (1, 4, 32, 4, 256), (2, 3, 64, 8, 200), (1, 1, 32, 16, 128)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def make_inputs(shape, tokens, position, dtype, device) -> dict:
    kv_heads, group, dim, half, capacity = shape
    pages, total = make_pages([capacity])
    floats = {
        "qkv": torch.randn(tokens, 2 * kv_heads * (group + 1) * dim),
        "q_norm": torch.randn(dim) * 0.3,
        "k_norm": torch.randn(dim) * 0.3,
        "k_cache": torch.randn(total, kv_heads, ops.PAGE_SIZE, dim),
        "v_cache": torch.randn(total, kv_heads, ops.PAGE_SIZE, dim),
    }
    inputs = {name: value.to(device, dtype) for name, value in floats.items()}
    inv_freq = 1e4 ** -(torch.arange(half, device=device) / half)
    positions = torch.tensor([position], device=device)
    return inputs | {"inv_freq": inv_freq, "pages": pages.to(device), "positions": positions}


def clone(inputs: dict) -> dict:
    return {name: value.clone() for name, value in inputs.items()}


def counted(inputs: dict, valid: int | None) -> dict:
    if valid is None:
        return inputs
    return inputs | {"num_tokens": torch.tensor([valid], device=inputs["qkv"].device)}


def check(inputs: dict, valid: int | None = None) -> None:
    """Runs kernels and reference on copies of the inputs and compares outputs and caches."""
    got_inputs, expected_inputs = clone(inputs), clone(inputs)
    got = attention(**counted(got_inputs, valid))
    expected = ops.attention(**counted(expected_inputs, valid))
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if valid != 0:
        assert relative_error(got[:valid], expected[:valid]) < tolerance
    assert torch.equal(got_inputs["v_cache"], expected_inputs["v_cache"])
    first = int(inputs["positions"])
    place = inputs["pages"], first, first + got[:valid].shape[0]
    got, got_rest = take_out(got_inputs["k_cache"], *place)
    expected, expected_rest = take_out(expected_inputs["k_cache"], *place)
    assert relative_error(got, expected) < tolerance
    assert torch.equal(got_rest, expected_rest)


def take_out(pool, pages, first, end) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of some tokens of a sequence, `[Hkv, end - first, D]`, and a pool without them."""
    token, rest = torch.arange(first, end, device=pool.device), pool.clone()
    rest[pages[0, token // ops.PAGE_SIZE].long(), :, token % ops.PAGE_SIZE] = 0.0
    return read_cache(pool, pages[0], end)[:, first:], rest


@pytest.fixture
def few_splits(reconfigure):
    """Takes so few splits that one split has several tiles and the interpreter has little to do."""
    reconfigure("attention_decode", SPLITS=4, BLOCK_N=16, num_warps=4)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("position", [0, 1, 15, 16, 17, 63, 64, 65, 66, 130, 199])
def test_decode_positions(position, dtype, device):
    """Positions from an empty cache to its last row, around the edges of tiles and of splits."""
    check(make_inputs(GROUP_3, 1, position, dtype, device))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [ONE_KV, FULL_ROPE])
def test_decode_shapes(shape, dtype, device):
    check(make_inputs(shape, 1, 100, dtype, device))


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("valid", [0, 1])
def test_decode_counted(valid, device):
    check(make_inputs(ONE_KV, 1, 33, torch.float32, device), valid)


@pytest.fixture
def small_tiles(reconfigure):
    """Takes tiles so small that even a short prompt has several tiles of queries and of keys."""
    reconfigure("attention_prefill", BLOCK_M=32, BLOCK_N=16, STAGES=1, num_warps=4)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("position", [0, 5, 32])
@pytest.mark.parametrize("tokens", [2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 129])
def test_prefill_lengths(tokens, position, device):
    check(make_inputs(ONE_KV, tokens, position, torch.float32, device))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [ONE_KV, GROUP_3, FULL_ROPE])
def test_prefill_shapes(shape, dtype, device):
    check(make_inputs(shape, 40, 21, dtype, device))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tokens,valid", [(40, 0), (40, 1), (40, 32), (40, 33), (70, 40)])
def test_padding(tokens, valid, device):
    """Padded rows may hold anything, are not appended, and come out as zeros."""
    inputs = make_inputs(ONE_KV, tokens, 250 - valid, torch.float32, device)
    check(inputs, valid)
    inputs["qkv"][valid:] = float("nan")
    clean = clone(inputs)
    out = attention(**counted(inputs, valid))
    assert torch.count_nonzero(out[valid:]) == 0 and torch.isfinite(out).all()
    for name in ("k_cache", "v_cache"):
        place = inputs["pages"], 250 - valid, 250
        (_, rest), (_, rest_before) = (take_out(x[name], *place) for x in (inputs, clean))
        assert torch.equal(rest, rest_before)


@pytest.mark.usefixtures("few_splits", "small_tiles")
def test_pieces_equal_the_whole(device):
    inputs = make_inputs(GROUP_3, 40, 50, torch.float32, device)
    whole, pieces = clone(inputs), clone(inputs)
    expected = attention(**whole)
    results, position = [], 50
    for piece in inputs["qkv"].split((33, 1, 6)):
        here = torch.tensor([position], device=device)
        results.append(attention(**pieces | {"qkv": piece.contiguous(), "positions": here}))
        position += piece.shape[0]
    assert relative_error(torch.cat(results), expected) < 1e-5
    for name in ("k_cache", "v_cache"):
        assert relative_error(pieces[name], whole[name]) < 1e-6


@triton.jit
def _sincos_kernel(angle_ptr, sin_ptr, cos_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sin, cos = sincos(tl.load(angle_ptr + index))
    tl.store(sin_ptr + index, sin)
    tl.store(cos_ptr + index, cos)


def test_sincos(device):
    """Angles may be many turns, as they are at positions far into the cache."""
    edges = torch.arange(-8, 9) * (torch.pi / 4)
    angles = torch.cat((edges, torch.rand(2000) * 10, torch.rand(2079) * 1e5)).to(device)
    sin, cos = torch.empty_like(angles), torch.empty_like(angles)
    _sincos_kernel[(4,)](angles, sin, cos, BLOCK=1024)
    assert (sin - angles.double().sin()).abs().max() < 3e-6
    assert (cos - angles.double().cos()).abs().max() < 3e-6


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-30, 1e15])
def test_magnitudes(scale, tokens, device):
    """q and k are normed: their magnitude matters only where eps does."""
    inputs = make_inputs(ONE_KV, tokens, 7, torch.float32, device)
    inputs["qkv"].mul_(scale)
    check(inputs)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 40])
def test_repeatable(tokens, dtype, device):
    inputs = make_inputs(ONE_KV, tokens, 99, dtype, device)
    first, second = clone(inputs), clone(inputs)
    assert torch.equal(attention(**first), attention(**second))
    assert torch.equal(first["k_cache"], second["k_cache"])


@pytest.mark.usefixtures("few_splits")
def test_launches(device):
    for tokens in (1, 5):
        with record_launches(run=True) as recorded:
            check(make_inputs(ONE_KV, tokens, 9, torch.bfloat16, device))
        assert len(recorded) == 2


# Cached tokens of the sequences of a batch and which of them have a row: one has none, and no page
# either, others end before, at and behind the edge of a page and of a split, or have a single tile.
LENGTHS, VALID = (0, 150, 63, 64, 0, 17, 65), (1, 1, 1, 1, 0, 0, 1)


def make_batch(shape, dtype, device) -> dict:
    """Arguments of one token of each sequence, counted."""
    inputs = make_inputs(shape, len(LENGTHS), 0, dtype, device)
    room = [length + valid for length, valid in zip(LENGTHS, VALID, strict=True)]
    pages, total = make_pages(room)
    for name in ("k_cache", "v_cache"):
        pool = torch.randn(total, *inputs[name].shape[1:])
        inputs[name] = pool.to(inputs[name])
    return inputs | {
        "pages": pages.to(device),
        "positions": torch.tensor(LENGTHS, device=device),
        "num_tokens": torch.tensor(VALID, device=device),
    }


@pytest.fixture(params=[1, 2, 3])
def programs(request, monkeypatch) -> int:
    """Programs per KV head and sequence, and thereby how many of the four splits each takes."""
    monkeypatch.setattr(decode, "BATCH_PROGRAMS", request.param * 2 * len(LENGTHS))
    return request.param


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_batch(dtype, programs, device):
    """Each sequence gets what it gets of the reference, and padding gets zeros and writes
    nothing."""
    inputs = make_batch(GROUP_3, dtype, device)
    inputs["qkv"][[4, 5]] = float("nan")
    got_inputs, expected_inputs = clone(inputs), clone(inputs)
    with record_launches(run=True) as recorded:
        got = attention(**got_inputs)
    assert recorded[0].grid == (programs, 2, len(LENGTHS)) and len(recorded) == 2
    expected = ops.attention(**expected_inputs)
    assert relative_error(got, expected) < TOLERANCE[dtype]
    assert torch.count_nonzero(got[[4, 5]]) == 0
    assert torch.equal(got_inputs["v_cache"], expected_inputs["v_cache"])
    changed = got_inputs["k_cache"] != inputs["k_cache"]
    assert torch.equal(changed.any(-1), (got_inputs["v_cache"] != inputs["v_cache"]).any(-1))
    assert relative_error(got_inputs["k_cache"], expected_inputs["k_cache"]) < TOLERANCE[dtype]


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_batch_does_not_matter(dtype, programs, device):
    """A sequence alone, without a count, gets the bits that it gets among others in other pages and
    at another place. Under the interpreter, whose arithmetic is numpy's, this is only a hint that
    it holds on a GPU."""
    inputs = make_batch(GROUP_3, dtype, device)
    together = clone(inputs)
    out = attention(**together)
    for b, (length, valid) in enumerate(zip(LENGTHS, VALID, strict=True)):
        if not valid:
            continue
        alone = make_inputs((*GROUP_3[:4], length + 1), 1, length, dtype, device)
        alone |= {name: inputs[name] for name in ("q_norm", "k_norm")}
        alone["qkv"] = inputs["qkv"][b : b + 1].clone()
        token = torch.arange(length, device=device)
        here, there = (x[token // 64].long() for x in (inputs["pages"][b], alone["pages"][0]))
        for name in ("k_cache", "v_cache"):
            alone[name][there, :, token % 64] = inputs[name][here, :, token % 64]
        assert torch.equal(attention(**alone)[0], out[b])
        for name in ("k_cache", "v_cache"):
            got = read_cache(together[name], inputs["pages"][b], length + 1)
            assert torch.equal(read_cache(alone[name], alone["pages"][0], length + 1), got)


def test_several_rows_of_several_sequences(device):
    inputs = make_batch(ONE_KV, torch.float32, device)
    inputs["qkv"] = inputs["qkv"].repeat(2, 1)
    with pytest.raises(ValueError, match="14 rows of 7 sequences: expected one row of each"):
        attention(**inputs)


@pytest.mark.usefixtures("few_splits", "small_tiles")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("first", [1, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("tokens,position", [(1, 0), (1, 15), (1, 70), (40, 0), (40, 50)])
def test_first_token(tokens, position, first, dtype, device):
    """What lies before it is never read, whatever it is, and rows there get zeros."""
    inputs = make_inputs(GROUP_3, tokens, position, dtype, device)
    token = torch.arange(min(first, position), device=device)
    where = inputs["pages"][0, token // ops.PAGE_SIZE].long(), slice(None), token % ops.PAGE_SIZE
    for name in ("k_cache", "v_cache"):
        inputs[name][where] = float("nan")
    got_inputs, expected_inputs = clone(inputs), clone(inputs)
    got = attention(**got_inputs, first_token=first)
    expected = ops.attention(**expected_inputs, first_token=first)
    hidden = max(0, min(first - position, tokens))
    assert torch.isfinite(got).all() and torch.count_nonzero(got[:hidden]) == 0
    if hidden < tokens:
        assert relative_error(got, expected) < TOLERANCE[dtype]
    for name in ("k_cache", "v_cache"):
        left, wanted = (x[name].nan_to_num(nan=0.5) for x in (got_inputs, expected_inputs))
        assert relative_error(left, wanted) < TOLERANCE[dtype]


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """On a GPU Triton 3.6 fuses other products of two kernels in fp32, as in test_linear.py."""
    if torch.cuda.is_available() and triton.__version__ < "3.7" and got.dtype == torch.float32:
        assert relative_error(got, expected) < TOLERANCE[torch.float32]
    else:
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_rows_of_drafts(rows, first, dtype, programs, device):
    """Each row of each sequence gets the bits that it gets in a call of its own. Under the
    interpreter this is only a hint that it holds on a GPU."""
    valid = [min(rows, n) for n in (3, 4, 2, 1, 0, 0, 4)]
    inputs = make_inputs(GROUP_3, rows * len(LENGTHS), 0, dtype, device)
    pages, total = make_pages([a + b for a, b in zip(LENGTHS, valid, strict=True)])
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.randn(total, *inputs[name].shape[1:]).to(inputs[name])
    inputs |= {"pages": pages.to(device), "positions": torch.tensor(LENGTHS, device=device)}
    counts = {"num_tokens": torch.tensor(valid, device=device)}
    given, expected_inputs = clone(inputs | counts), clone(inputs | counts)
    with record_launches(run=True) as recorded:
        out = attention(**given, first_token=first, each_row=True)
    assert len(recorded) == 3
    expected = ops.attention(**expected_inputs, first_token=first, each_row=True)
    out, expected = (x.unflatten(0, (len(LENGTHS), rows)) for x in (out, expected))
    step = clone(inputs)
    for r in range(rows):
        is_valid = torch.tensor([r < n for n in valid], device=device)
        step["qkv"] = inputs["qkv"].unflatten(0, (len(LENGTHS), rows)).select(1, r).contiguous()
        step["positions"] = inputs["positions"] + r
        alone = attention(**step, num_tokens=is_valid.long(), first_token=first)
        assert_same_bits(out[:, r], alone)
        assert torch.count_nonzero(out[~is_valid, r]) == 0
        assert relative_error(out[is_valid, r], expected[is_valid, r]) < TOLERANCE[dtype]
    for name in ("k_cache", "v_cache"):
        assert_same_bits(given[name], step[name])
        assert relative_error(given[name], expected_inputs[name]) < TOLERANCE[dtype]


@pytest.mark.usefixtures("few_splits")
def test_rows_of_drafts_of_one_sequence(device):
    inputs = make_inputs(ONE_KV, 3, 62, torch.float32, device)
    step, together = clone(inputs), clone(inputs)
    out = attention(**together, each_row=True)
    for r in range(3):
        step |= {"qkv": inputs["qkv"][r : r + 1], "positions": inputs["positions"] + r}
        assert_same_bits(attention(**step)[0], out[r])
    assert torch.equal(together["k_cache"], step["k_cache"])
    with pytest.raises(ValueError, match="6 rows of 1 sequences: expected 1 to 5 rows of each"):
        attention(**make_inputs(ONE_KV, 6, 0, torch.float32, device), each_row=True)
