"""The router against its eager reference."""

import pytest
import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.router.op import moe_router

ROWS = [1, 2, 3, 15, 16, 17, 31, 64, 65, 129]


def check(got, expected):
    assert torch.equal(got[2], expected[2])
    assert got[0].dtype == expected[0].dtype
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


def inputs(m, device, experts=32, hidden=96):
    return (
        torch.randn(m, hidden, device=device),
        torch.randn(hidden, device=device) * 0.1,
        torch.randn(experts + 1, hidden, device=device) * 0.1,
    )


def exact_inputs(m, device, dtype, experts=32, hidden=96):
    """Rows of +-1 and weights that are multiples of 1/16: sums are exact in any order, and there
    are many ties."""
    x = torch.randint(0, 2, (m, hidden), device=device).to(dtype) * 2 - 1
    weight = torch.randint(-8, 9, (experts + 1, hidden), device=device).to(dtype) / 16
    return x, torch.zeros(hidden, dtype=dtype, device=device), weight


@pytest.mark.parametrize("m", ROWS)
def test_rows(m, device):
    args = inputs(m, device)
    with record_launches(run=True) as launches:
        got = moe_router(*args, 4, 1)
    assert len(launches) == (2 if m <= 16 else 3)
    check(got, ops.moe_router(*args, 4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 4, 45])
def test_ties_take_the_lower_id(m, dtype, device):
    args = exact_inputs(m, device, dtype)
    check(moe_router(*args, 9, 1, eps=0.0), ops.moe_router(*args, 9, 1, eps=0.0))


@pytest.mark.parametrize("m", [2, 18])
def test_bf16_norm(m, device):
    args = [t.bfloat16() for t in inputs(m, device)]
    got, expected = moe_router(*args, 4, 1), ops.moe_router(*args, 4, 1)
    torch.testing.assert_close(got[0], expected[0], rtol=2**-8, atol=0)


@pytest.mark.parametrize("experts,top_k,num_shared", [(4, 2, 0), (8, 8, 2), (60, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("m", [1, 19])
def test_tables(m, experts, top_k, num_shared, device):
    args = inputs(m, device, experts=experts)
    check(moe_router(*args, top_k, num_shared), ops.moe_router(*args, top_k, num_shared))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("m,hidden", [(1, 2048), (3, 96), (20, 96)])
def test_as_many_experts_as_qwen3_next_has(m, hidden, normalize, device):
    args = inputs(m, device, experts=512, hidden=hidden)
    got = moe_router(*args, 10, 1, normalize=normalize)
    check(got, ops.moe_router(*args, 10, 1, normalize=normalize))


@pytest.mark.parametrize("m", [1, 19])
@pytest.mark.parametrize("experts,top_k,num_shared", [(4, 2, 0), (60, 4, 1), (8, 8, 2)])
def test_weights_that_are_not_normalized(m, experts, top_k, num_shared, device):
    """They are parts of the softmax over all experts and add up to less than 1, as some are not
    chosen."""
    args = inputs(m, device, experts=experts)
    num_tokens = torch.tensor([m - 1], device=device)
    for valid in (None, num_tokens):
        got = moe_router(*args, top_k, num_shared, num_tokens=valid, normalize=False)
        check(got, ops.moe_router(*args, top_k, num_shared, num_tokens=valid, normalize=False))
    if top_k < experts:
        assert (moe_router(*args, top_k, 0, normalize=False)[1].sum(-1) < 0.999).all()


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_padding(m, valid, device):
    args = inputs(m, device)
    num_tokens = torch.tensor([valid], device=device)
    got = moe_router(*args, 4, 1, num_tokens=num_tokens)
    check(got, ops.moe_router(*args, 4, 1, num_tokens=num_tokens))
    assert (got[2][valid:] == -1).all() and (got[1][valid:] == 0).all()


@pytest.mark.parametrize("m", [5, 40])
def test_padding_of_a_batch(m, device):
    """Rows of sequences without a token may hold anything, and others get the bits that they get
    alone. Under the interpreter, whose arithmetic is numpy's, the latter is only a hint that it
    holds on a GPU for as many rows as have the same kernels."""
    args = inputs(m, device)
    num_tokens = (torch.arange(m, device=device) % 3 != 1).long()
    args[0][1] = float("nan")
    got = moe_router(*args, 4, 1, num_tokens=num_tokens)
    expected = ops.moe_router(*args, 4, 1, num_tokens=num_tokens)
    valid = num_tokens == 1
    check([x[valid] for x in got], [x[valid] for x in expected])
    assert (got[2][~valid] == -1).all() and (got[1][~valid] == 0).all()
    if m <= 16:
        for b in valid.nonzero().flatten().tolist():
            alone = moe_router(args[0][b : b + 1], *args[1:], 4, 1)
            assert all(torch.equal(one[0], x[b]) for one, x in zip(alone, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [[1, 2, 7, 16], [17, 40]])
def test_rows_do_not_depend_on_others(tokens, dtype, device):
    """A row gets the same bits among any number of others that take the same kernels, wherever it
    stands. Under the interpreter this is only a hint that it holds on a GPU."""
    x, *weights = (t.to(dtype) for t in inputs(max(tokens), device))
    expected = moe_router(x, *weights, 4, 1)
    for count in tokens:
        rows = torch.randperm(max(tokens))[:count].tolist()
        got = moe_router(x[rows], *weights, 4, 1)
        assert all(torch.equal(a, b[rows]) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [2, 7])
def test_several_rows_of_several_sequences(rows, device):
    """Padding stands behind the rows of each sequence and is routed nowhere."""
    given, counts = inputs(3 * rows, device), torch.tensor([1, 0, 2], device=device)
    got = moe_router(*given, 4, 1, num_tokens=counts)
    check(got, ops.moe_router(*given, 4, 1, num_tokens=counts))
    assert ((got[2] >= 0).all(-1).view(3, rows).sum(1) == counts).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-30, 1e4, 1e15])
def test_extreme_rows(m, scale, normalize, device):
    x, norm, weight = inputs(m, device)
    # The largest routing weight is 1, and most others underflow.
    args = (x * scale, norm, weight * 100)
    expected = ops.moe_router(*args, 4, 1, normalize=normalize)
    check(moe_router(*args, 4, 1, normalize=normalize), expected)


@pytest.mark.parametrize("m", [1, 2])
def test_order_of_what_is_hardly_a_number(m, device):
    """NaNs come first, and infinities where their sign puts them. Zeros of both signs are equal;
    denormals differ from zero and from each other."""
    rows = [0.0, -0.0, 1e-43, -1e-43, float("inf"), -float("inf"), float("nan"), -0.0, 0.0]
    weight = torch.tensor([*rows, -float("nan"), 1.0, 0.0], device=device)[:, None]
    args = (torch.ones(m, 1, device=device), torch.zeros(1, device=device), weight)
    got, expected = moe_router(*args, 11, 1, eps=0.0), ops.moe_router(*args, 11, 1, eps=0.0)
    assert expected[2][0].tolist() == [6, 9, 4, 10, 2, 0, 1, 7, 8, 3, 5, 11]
    assert torch.equal(got[2], expected[2])
    assert got[1][:, :11].isnan().all() and expected[1][:, :11].isnan().all()


@pytest.mark.parametrize("m", [1, 17])
def test_equal_probabilities_of_unequal_logits(m, device):
    """Far below the largest logit all probabilities are 0, and the order of the logits decides."""
    weight = torch.arange(-1000.0, 1001, 100, device=device)[:, None]
    args = (torch.ones(m, 1, device=device), torch.zeros(1, device=device), weight)
    got = moe_router(*args, 5, 1, eps=0.0)
    check(got, ops.moe_router(*args, 5, 1, eps=0.0))
    assert got[2][0].tolist() == [19, 18, 17, 16, 15, 20]


@pytest.mark.parametrize("m", [1, 33])
def test_repeatable(m, device):
    args = [t.bfloat16() for t in inputs(m, device)]
    for first, second in zip(moe_router(*args, 4, 1), moe_router(*args, 4, 1), strict=True):
        assert torch.equal(first, second)


def test_too_few_experts(device):
    with pytest.raises(ValueError, match="top_k 40 of 32"):
        moe_router(*inputs(1, device), 40, 1)


@pytest.mark.parametrize("m", [1, 17])
def test_invalid_rows_do_not_leave_the_table(m, device):
    x, norm, weight = inputs(m, device, experts=20)
    ids = moe_router(x * float("nan"), norm, weight, 4, 1)[2]
    assert (ids >= 0).all() and (ids <= 20).all()
