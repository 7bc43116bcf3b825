"""CPU kernels of states in versions, and of rows that must have the bits that they have alone."""

import pytest
import torch
from op_harness import Harness, normal
from test_cpu_attention import attention_call
from test_cpu_gated_delta_net import HEADS, conv_call, net_call, rule_call

VERSIONS = 4
MIXED = (((3, 0, 1, 2), (3, 9, 0, 1)), ((4, 4), (2, 0)), ((1,), (3,)))
"""Valid rows of sequences of four rows, and the versions that they go on from."""
STATES = {"causal_conv1d": (2,), "gated_delta_rule": (5,), "gated_delta_net": (5, 6)}
"""Which arguments of an op are states; those of a convolution come first."""
MAKE = {
    "causal_conv1d": lambda *a: conv_call(a[0], 44, 4, *a[1:]),
    "gated_delta_rule": lambda *a: rule_call(a[0], HEADS[2], *a[1:]),
    "gated_delta_net": lambda *a: net_call(a[0], HEADS[2], 4, *a[1:]),
}


def versioned(op: str, args: list, versions: tuple[int, ...], each_row: bool) -> list:
    """A call with states in versions, made of one without."""
    args = list(args)
    for i in STATES[op]:
        slots, *shape = args[i].shape
        is_conv = len(shape) == 2
        shape = [shape[0] + VERSIONS - 1, shape[1]] if is_conv else [VERSIONS, *shape]
        args[i] = normal(slots, *shape, dtype=args[i].dtype, seed=i)
    return [*args, torch.tensor(versions), each_row]


@pytest.mark.parametrize("op", STATES)
@pytest.mark.parametrize("each_row", [False, True])
def test_versions(harness: Harness, op: str, each_row: bool, dtype: torch.dtype) -> None:
    calls = [
        versioned(op, MAKE[op](4, dtype, valid, len(valid)), versions, each_row)
        for valid, versions in MIXED
    ]
    harness.compare(op, calls)


@pytest.mark.parametrize("op", STATES)
def test_a_prompt_goes_on_from_a_version(harness: Harness, op: str, dtype: torch.dtype) -> None:
    calls = [
        versioned(op, MAKE[op](n, dtype, (valid,), 1), (2,), False)
        for n, valid in ((17, 17), (17, 2), (65, 40))
    ]
    harness.compare(op, calls)


@pytest.mark.parametrize("taps", [1, 2])
def test_convolution_of_few_taps(harness: Harness, taps: int) -> None:
    args = conv_call(3, 20, taps, torch.float32, (3, 2), 2)
    args[2] = normal(4, taps + 1, 20, seed=9)
    harness.compare("causal_conv1d", [[*args, torch.tensor([2, 0]), True]])


@pytest.mark.parametrize("op", STATES)
def test_rows_have_the_bits_that_they_have_alone(
    harness: Harness, op: str, dtype: torch.dtype
) -> None:
    check_rows(harness, op, MAKE[op](VERSIONS, dtype, (VERSIONS,) * 2, 2))


def check_rows(harness: Harness, op: str, args: list) -> None:
    """Calls of one row each, of which the next goes on from what the last one left as version 0,
    give the rows and the versions of one call. args: of two sequences, without versions."""
    args = versioned(op, args, (3, 1), True)
    *left, out = harness.run(op, [args])[0][0].tensors
    slots = next(a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int32).long()
    rows = 5 if op == "gated_delta_rule" else 1
    step = list(args)
    for r in range(VERSIONS):
        for i in range(rows):
            step[i] = args[i].unflatten(0, (2, VERSIONS)).select(1, r).contiguous()
        step[-3:] = [torch.ones_like(args[-3]), args[-2] if r == 0 else args[-2] * 0, False]
        *states, row = harness.run(op, [step])[0][0].tensors
        assert torch.equal(out.unflatten(0, (2, VERSIONS)).select(1, r), row)
        for i, one, together in zip(STATES[op], states, left, strict=True):
            step[i] = one
            if one.dim() == 3:
                taps = one.shape[1] - VERSIONS + 1
                one, together = one[:, :taps], together[:, r : r + taps]
            else:
                one, together = one.select(1, 0), together.select(1, r)
            assert torch.equal(one[slots], together[slots])


@pytest.mark.parametrize("op", STATES)
@pytest.mark.parametrize("version", [-1, VERSIONS, 2**62, -(2**62)])
def test_refuses_versions_that_there_are_not(harness: Harness, op: str, version: int) -> None:
    """Only those of sequences without valid rows may be anything."""
    args = versioned(op, MAKE[op](3, torch.float32, (3, 1), 2), (0, version), True)
    message = f"et_moe::{op}: versions: that of sequence 1 is {version}, there are {VERSIONS}"
    harness.refuse(op, args, message)


@pytest.mark.parametrize("op", STATES)
def test_refuses_more_rows_than_versions(harness: Harness, op: str) -> None:
    args = versioned(op, MAKE[op](5, torch.float32, (5, 1), 2), (0, 0), True)
    message = f"et_moe::{op}: versions: 5 rows of a sequence leave as many, there are {VERSIONS}"
    harness.refuse(op, args, message)
    args = [*MAKE[op](2, torch.float32, (2, 1), 2), None, True]
    harness.refuse(op, args, f"et_moe::{op}: versions: each_row expected them")


def test_refuses_a_convolution_state_without_a_whole_version(harness: Harness) -> None:
    args = conv_call(1, 20, 4, torch.float32)
    args[2] = args[2][:, :2].contiguous()
    message = "state: expected rows of at least one version, got 1 too few"
    harness.refuse("causal_conv1d", [*args, torch.tensor([0]), False], message)


@pytest.mark.parametrize("first", [1, 3, 64, 70])
def test_attention_from_a_first_token(harness: Harness, first: int, dtype: torch.dtype) -> None:
    """What lies before it, even in the pages' unused entries, is never read."""
    positions, heads = (0, 1, 63, 64, 150), (4, 2, 16, 4)
    calls = [
        [*attention_call(rows, heads, positions, dtype, None, 192), first, True] for rows in (1, 4)
    ]
    for args in calls:
        pages = args[6].long()
        for token in range(first):
            for cache in args[4:6]:
                cache[pages[:, token // 64], :, token % 64] = float("nan")
    results = harness.run("attention", calls)[0]
    for args, result in zip(calls, results, strict=True):
        out = result.tensors[-1].unflatten(0, (len(positions), -1))
        assert result.error == 0 and torch.isfinite(out).all(), harness.log
        row = torch.arange(out.shape[1])
        nothing = torch.tensor(positions)[:, None] + row < first
        assert not out[nothing].any() and out[~nothing].any(-1).all()
        for cache in args[4:6]:
            cache.nan_to_num_(nan=0.5)
    harness.compare("attention", calls)


def test_attention_of_rows_has_the_bits_of_one_row(harness: Harness, dtype: torch.dtype) -> None:
    heads, positions = (4, 2, 16, 4), (0, 62, 63, 130)
    args = [*attention_call(4, heads, positions, dtype, None, 192), 1, True]
    *caches, out = harness.run("attention", [args])[0][0].tensors
    step = list(args)
    for r in range(4):
        step[0] = args[0].unflatten(0, (4, 4)).select(1, r).contiguous()
        step[7] = args[7] + r
        *step[4:6], row = harness.run("attention", [step])[0][0].tensors
        assert torch.equal(out.unflatten(0, (4, 4)).select(1, r), row)
    for one, together in zip(step[4:6], caches, strict=True):
        assert torch.equal(one, together)


@pytest.mark.parametrize("first", [-1, 129])
def test_attention_refuses_a_first_token_that_no_page_has(harness: Harness, first: int) -> None:
    args = [*attention_call(1, (4, 2, 16, 4), (100,), torch.float32), first, False]
    message = f"first_token: expected a token of 2 pages or their end, got {first}"
    harness.refuse("attention", args, message)


@pytest.mark.parametrize("columns", [1, 44, 200])
def test_rms_norm(harness: Harness, columns: int, dtype: torch.dtype) -> None:
    weight = normal(columns, dtype=dtype, seed=1) * 0.3
    calls = [[normal(n, columns, dtype=dtype, seed=n), weight, 1e-6] for n in (1, 2, 17)]
    harness.compare("rms_norm", calls)


def test_linear_behind_a_norm_of_its_own(harness: Harness, dtype: torch.dtype) -> None:
    """Both ways to compute a norm give the same bits."""
    x, norm = normal(5, 192, dtype=dtype, seed=1), normal(192, dtype=dtype, seed=2)
    weight = normal(30, 192, dtype=dtype, seed=3)
    (normed,) = harness.run("rms_norm", [[x, norm, 1e-6]])[0][0].tensors
    (expected,) = harness.run("linear", [[x, weight, norm, 1e-6, None]])[0][0].tensors
    (got,) = harness.run("linear", [[normed, weight, None, 1e-6, None]])[0][0].tensors
    assert torch.equal(got, expected)


def test_sample_draws_rows_as_they_are_drawn_alone(harness: Harness) -> None:
    """Greedy, filtered and plain sequences, of three rows each."""
    parameters = [
        torch.tensor([0.0, 0.8, 1.0, 1.0]),
        torch.tensor([0, 5, 0, 0]),
        torch.tensor([1.0, 1.0, 0.7, 1.0]),
        torch.tensor([1, 2, 3, -4]),
        torch.tensor([5, 0, 2**32 - 2, 2**40]),
    ]
    logits = normal(12, 700, seed=1) * 2
    call = [logits, *parameters]
    (together,) = harness.run("sample", [call])[0][0].tensors
    assert together.shape == (4, 3)
    for r in range(3):
        own = [logits.unflatten(0, (4, 3)).select(1, r).contiguous(), *parameters]
        own[-1] = own[-1] + r
        (alone,) = harness.run("sample", [own])[0][0].tensors
        assert torch.equal(alone.flatten(), together.select(1, r))
    harness.compare("sample", [call])


def test_sample_refuses_rows_that_sequences_do_not_share(harness: Harness) -> None:
    args = [normal(5, 9), *(torch.ones(2, dtype=d) for d in (torch.float32, torch.int64))]
    args += [torch.ones(2), *torch.ones(2, 2, dtype=torch.int64)]
    harness.refuse("sample", args, "logits: 5 rows cannot be shared equally by 2 sequences")
