"""CPU kernels of the router and of the expert MLPs against their references."""

import pytest
import torch
from op_harness import MOE_OPS, TOKENS, Harness, normal, quantized, reference

from et_moe.backends import ops

HIDDEN, EXPERTS = 64, 6


def _weights(
    op: str,
    hidden: int,
    inner: int,
    group: int,
    dtype: torch.dtype,
    scale_dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
) -> list:
    """The weight arguments of an expert op: w13 and w2, with scales if quantized."""
    w13 = normal(EXPERTS, 2 * inner, hidden, dtype=dtype, seed=1) * hidden**-0.5
    w2 = normal(EXPERTS, hidden, inner, dtype=dtype, seed=2) * inner**-0.5
    if op == "moe":
        return [w13, w2]
    if op.startswith("moe_w8"):
        return [*ops.quantize_w8(w13), *ops.quantize_w8(w2)]
    first, second = scale_dtypes
    return [*quantized(w13, group, first), *quantized(w2, group, second)]


def _route(tokens: int, slots: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids as a router gives them: no expert twice for a token."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, slots, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(tokens)])
    return weights, ids[:, :slots].to(torch.int32)


def _call(op: str, tokens: int, routing: tuple, weights: list, group: int, dtype: torch.dtype):
    is_int4 = op.startswith("moe_w4")
    x = normal(tokens, weights[0].shape[-1] * (2 if is_int4 else 1), dtype=dtype, seed=tokens)
    return [x, *weights, *routing] + ([group] if is_int4 else [])


@pytest.mark.parametrize("op", MOE_OPS)
@pytest.mark.parametrize(
    ("hidden", "inner", "group"),
    [(96, 32, 32), (192, 64, 64), (128, 128, 128), (128, 160, 32), (128, 256, 128)],
)
def test_moe(
    harness: Harness, op: str, hidden: int, inner: int, group: int, dtype: torch.dtype
) -> None:
    weights = _weights(op, hidden, inner, group, dtype)
    harness.compare(op, [_call(op, t, _route(t, 3), weights, group, dtype) for t in TOKENS])


@pytest.mark.parametrize("op", ["moe_w4a8", "moe_w4a16"])
@pytest.mark.parametrize(
    ("hidden", "inner", "group"), [(96, 32, 32), (192, 64, 64), (128, 256, 128)]
)
def test_float16_scales(harness: Harness, op: str, hidden: int, inner: int, group: int) -> None:
    """The scales of both weight tables are float16, or those of one only."""
    for first, second in ((torch.float16, torch.float16), (torch.float16, torch.bfloat16)):
        weights = _weights(op, hidden, inner, group, torch.float32, (first, second))
        calls = [_call(op, t, _route(t, 3), weights, group, torch.float32) for t in TOKENS]
        harness.compare(op, calls)


@pytest.mark.parametrize("op", MOE_OPS)
def test_moe_with_uneven_routing(harness: Harness, op: str, dtype: torch.dtype) -> None:
    """All tokens go to one expert, slots are skipped, a token has an expert twice, or no expert at
    all."""
    tokens, weights = 70, _weights(op, 64, 32, 32, dtype)
    one = torch.full((tokens, 2), 4, dtype=torch.int32)
    one[:, 1] = -1
    _, some = _route(tokens, 2)
    some[::3] = -1
    some[1::3, 0] = -7
    some[2::3, 1] = EXPERTS
    some[5::9, 0] = 2**31 - 1
    values, _ = _route(tokens, 2)
    routings = [one, some, torch.full_like(one, 3), torch.full_like(one, -1)]
    calls = [_call(op, tokens, (values, ids), weights, 32, dtype) for ids in routings]
    harness.compare(op, calls)


@pytest.mark.parametrize("op", MOE_OPS)
def test_moe_residual_and_int64_ids(harness: Harness, op: str, dtype: torch.dtype) -> None:
    weights = _weights(op, 64, 32, 32, dtype)
    values, ids = _route(5, 2)
    call = _call(op, 5, (values, ids.long()), weights, 32, dtype)
    harness.compare(op, [[*call, normal(5, 64, dtype=dtype, seed=9)]])


@pytest.mark.parametrize("op", ["moe_w4a8", "moe_w8a8"])
def test_moe_large_enough_for_threads(harness: Harness, op: str) -> None:
    weights = _weights(op, 512, 192, 64, torch.float32)
    calls = [_call(op, t, _route(t, 4, seed=t), weights, 64, torch.float32) for t in (1, 3, 90)]
    harness.compare(op, calls)


@pytest.mark.parametrize("op", ["moe", "moe_w8a8", "moe_w8a16"])
def test_widths_that_are_no_multiple_of_anything(
    harness: Harness, op: str, dtype: torch.dtype
) -> None:
    """Only INT4 weights have groups, which the widths are multiples of."""
    weights = _weights(op, 75, 37, 0, dtype)
    harness.compare(op, [_call(op, t, _route(t, 3), weights, 0, dtype) for t in TOKENS])


@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (2, 1), (8, 2), (9, 1)])
def test_router(harness: Harness, top_k: int, shared: int, dtype: torch.dtype) -> None:
    weight = normal(10, 72, dtype=dtype, seed=1) * 0.5
    norm = normal(72, dtype=dtype, seed=2) * 0.1
    calls = [[normal(t, 72, dtype=dtype, seed=t), norm, weight, top_k, shared] for t in TOKENS]
    harness.compare("moe_router", calls)


@pytest.mark.parametrize(("experts", "top_k"), [(9, 2), (9, 9), (512, 10)])
def test_router_without_normalization(
    harness: Harness, experts: int, top_k: int, dtype: torch.dtype
) -> None:
    weight = normal(experts + 1, 72, dtype=dtype, seed=1) * 0.5
    norm = normal(72, dtype=dtype, seed=2) * 0.1
    calls = [
        [normal(t, 72, dtype=dtype, seed=t), norm, weight, top_k, 1, 1e-6, None, False]
        for t in TOKENS
    ]
    harness.compare("moe_router", calls)
    sums = reference("moe_router", calls[-1])[1][:, :top_k].sum(-1)
    assert top_k == experts or sums.mean() < 0.99


def test_router_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    weight, norm = normal(17, 40, dtype=dtype, seed=1), torch.zeros(40, dtype=dtype)
    calls = [
        [normal(9, 40, dtype=dtype, seed=3), norm, weight, 4, 1, 1e-6, torch.tensor([valid])]
        for valid in (0, 1, 8, 9, 12, 2**40)
    ]
    harness.compare("moe_router", calls)


def test_router_of_sequences_with_padding(harness: Harness, dtype: torch.dtype) -> None:
    weight, norm = normal(17, 40, dtype=dtype, seed=1), torch.zeros(40, dtype=dtype)
    calls = [
        [normal(12, 40, dtype=dtype, seed=3), norm, weight, 4, 1, 1e-6, torch.tensor(valid)]
        for valid in ((3, 0, 1, 4), (0, 0), (1,) * 6 + (0,) * 6, (0, 6), (5, 2, 2**40))
    ]
    harness.compare("moe_router", calls)


def test_router_refuses_what_makes_no_sequences(harness: Harness) -> None:
    args = [normal(6, 40, seed=3), torch.zeros(40), normal(17, 40, seed=1), 4, 1, 1e-6]
    message = "num_tokens: expected at least 0, got -1 of sequence 2"
    harness.refuse(
        "moe_router", [*args, torch.tensor([1, 0, -1])], f"et_moe::moe_router: {message}"
    )
    message = "x: 6 rows cannot be shared equally by 4 sequences"
    harness.refuse("moe_router", [*args, torch.ones(4).long()], f"et_moe::moe_router: {message}")


def test_router_breaks_ties_by_the_lower_id(harness: Harness) -> None:
    weight = torch.zeros(13, 32)
    weight[3] = weight[7] = 1.0
    x = torch.stack((torch.ones(32), -torch.ones(32), torch.zeros(32)))
    harness.compare("moe_router", [[x, torch.zeros(32), weight, 5, 1]])


def test_router_orders_by_logits(harness: Harness) -> None:
    """The order holds even for logits whose probabilities are all 0, -inf among them. Zeros of both
    signs are equal."""
    rows = [0.0, -0.0, 500.0, 300.0, 400.0, -float("inf"), -300.0, -0.0, -400.0, -float("inf"), 1.0]
    args = [torch.ones(2, 1), torch.zeros(1), torch.tensor(rows)[:, None], 10, 1, 0.0]
    ids = harness.run("moe_router", [args])[0][0].tensors[2]
    assert ids.tolist() == [[2, 4, 3, 0, 1, 7, 6, 8, 5, 9, 10]] * 2
    harness.compare("moe_router", [args])


def test_router_with_weights_of_another_dtype(harness: Harness) -> None:
    x, norm = normal(4, 40, dtype=torch.bfloat16, seed=1), normal(40, seed=2)
    harness.compare("moe_router", [[x, norm, normal(17, 40, seed=3), 4, 1]])


def test_router_stays_in_range_without_numbers(harness: Harness) -> None:
    x = torch.full((2, 32), float("nan"))
    args = [x, torch.zeros(32), normal(9, 32, seed=1), 3, 1]
    ids = harness.run("moe_router", [args])[0][0].tensors[2]
    assert ids.tolist() == [[0, 1, 2, 8]] * 2
