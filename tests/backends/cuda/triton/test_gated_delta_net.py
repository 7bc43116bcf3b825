"""Gated delta net kernels against their eager references."""

import pytest
import torch
import triton
from sequences import make_slots

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net, gated_delta_rule
from et_moe.backends.cuda.triton.table import TRITON_OPS

# The relative L2 error that is allowed.
TOLERANCE = {
    torch.float32: 2e-6 if triton.knobs.runtime.interpret else 1e-4,
    torch.bfloat16: 5e-3,
}
# key heads, value heads per key head, Dk, Dv, taps
SMALL, GROUP_3, WIDE = (2, 1, 16, 32, 2), (1, 3, 32, 16, 4), (1, 2, 64, 32, 4)
STATES = ("conv_state", "recurrent_state")
SLOT, SLOTS = 2, 4
"""Where the state of a single sequence lies, and how many there are."""


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def net_inputs(shape, tokens, dtype, device) -> dict:
    key_heads, group, key_dim, value_dim, taps = shape
    heads = key_heads * group
    values = heads * value_dim
    channels = 2 * key_heads * key_dim + values
    floats = {
        "projected": torch.randn(tokens, channels + values + 2 * heads),
        "conv_weight": torch.randn(channels, taps) * 0.5,
        "a_log": torch.rand(heads),
        "dt_bias": torch.randn(heads) - 2,
        "norm_weight": torch.rand(value_dim) + 0.5,
        "conv_state": torch.randn(SLOTS, taps - 1, channels),
    }
    inputs = {name: value.to(device, dtype) for name, value in floats.items()}
    return inputs | {
        "recurrent_state": torch.randn(SLOTS, heads, key_dim, value_dim, device=device),
        "slots": torch.tensor([SLOT], dtype=torch.int32, device=device),
    }


def rule_inputs(shape, tokens, dtype, device) -> dict:
    key_heads, group, key_dim, value_dim, _ = shape
    heads = key_heads * group
    floats = {
        "q": torch.randn(tokens, key_heads, key_dim),
        "k": torch.randn(tokens, key_heads, key_dim),
        "v": torch.randn(tokens, heads, value_dim),
    }
    inputs = {name: value.to(device, dtype) for name, value in floats.items()}
    return inputs | {
        "g": -torch.rand(tokens, heads, device=device),
        "beta": torch.rand(tokens, heads, device=device),
        "state": torch.randn(SLOTS, heads, key_dim, value_dim, device=device),
        "slots": torch.tensor([SLOT], dtype=torch.int32, device=device),
    }


def clone(inputs: dict) -> dict:
    return {name: value.clone() for name, value in inputs.items()}


def counted(inputs: dict, valid: int | None) -> dict:
    if valid is None:
        return inputs
    return inputs | {"num_tokens": torch.tensor([valid], device=next(iter(inputs.values())).device)}


def check(op: str, inputs: dict, valid: int | None = None) -> dict:
    """Runs kernel and reference on copies of the inputs; returns what the kernel left of them."""
    got_inputs, expected_inputs = clone(inputs), clone(inputs)
    got = TRITON_OPS[op](**counted(got_inputs, valid))
    expected = getattr(ops, op)(**counted(expected_inputs, valid))
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype and got.shape == expected.shape
    rows = slice(0, valid)
    if valid != 0:
        assert relative_error(got[rows], expected[rows]) < tolerance
    for name, value in expected_inputs.items():
        if name == "conv_state" or (op == "causal_conv1d" and name == "state") or valid == 0:
            assert torch.equal(got_inputs[name], value), name
        else:
            assert relative_error(got_inputs[name], value) < tolerance, name
        if "state" in name:
            others = torch.arange(len(value)) != SLOT
            assert torch.equal(got_inputs[name][others], inputs[name][others]), name
    return got_inputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 128, 129, 193])
def test_lengths(tokens, dtype, device):
    check("gated_delta_net", net_inputs(SMALL, tokens, dtype, device))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens,valid", [(1, None), (1, 0), (1, 1), (40, None), (70, 67)])
@pytest.mark.parametrize("shape", [GROUP_3, WIDE])
def test_heads(shape, tokens, valid, dtype, device):
    check("gated_delta_net", net_inputs(shape, tokens, dtype, device), valid)


@pytest.mark.parametrize(
    "tokens,valid",
    [
        *((80, 0), (80, 1), (80, 2), (80, 3), (80, 64), (130, 65)),
        *((2, 0), (3, 1), (4, 2), (4, 3), (4, 4), (16, 0), (16, 9)),
    ],
)
def test_padding(tokens, valid, device):
    """Padded rows may hold anything, change nothing, and come out as zeros."""
    inputs = net_inputs(GROUP_3, tokens, torch.float32, device)
    expected = check("gated_delta_net", inputs, valid)
    inputs["projected"][valid:] = float("nan")
    got = clone(inputs)
    out = gated_delta_net(**counted(got, valid))
    assert torch.count_nonzero(out[valid:]) == 0 and torch.isfinite(out).all()
    for name in STATES:
        assert torch.equal(got[name], expected[name])


@pytest.mark.parametrize("tokens", [1, 66])
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-20, 1e6])
def test_magnitudes(scale, tokens, device):
    """Everything projected but the gates is scaled: q and k are normed, v and z go through SiLU."""
    inputs = net_inputs(SMALL, tokens, torch.float32, device)
    inputs["projected"][:, : -2 * inputs["a_log"].numel()] *= scale
    if scale != 1e-41:
        check("gated_delta_net", inputs)
        return
    # Denormal results have few digits.
    expected_inputs = clone(inputs)
    got, expected = gated_delta_net(**inputs), ops.gated_delta_net(**expected_inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-38)
    for name in STATES:
        torch.testing.assert_close(inputs[name], expected_inputs[name], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_true_head_size(dtype, device):
    shape = (1, 2, 128, 128, 4)
    for tokens in (1, 4, 16, 66):
        check("gated_delta_net", net_inputs(shape, tokens, dtype, device))


def test_pieces_equal_the_whole(device):
    """A prompt in pieces, one of them a single token, leaves the same states as the whole
    prompt."""
    inputs = net_inputs(GROUP_3, 80, torch.float32, device)
    whole, pieces = clone(inputs), clone(inputs)
    expected = gated_delta_net(**whole)
    results = []
    for piece in inputs["projected"].split((70, 1, 9)):
        results.append(gated_delta_net(**pieces | {"projected": piece.contiguous()}))
    assert relative_error(torch.cat(results), expected) < 1e-5
    for name in STATES:
        assert relative_error(pieces[name], whole[name]) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("shape", [GROUP_3, WIDE])
def test_few_tokens_have_the_bits_of_one_after_the_other(shape, tokens, dtype, device):
    """Under the interpreter, which adds as numpy does, this is only a hint that it holds on a
    GPU."""
    inputs = rule_inputs(shape, tokens, dtype, device)
    together, apart = clone(inputs), clone(inputs)
    with record_launches(run=True) as launches:
        got = gated_delta_rule(**together)
    assert [x.name for x in launches] == ["_few_tokens_kernel"]
    rows = [
        gated_delta_rule(
            **apart | {name: inputs[name][[i]] for name in ("q", "k", "v", "g", "beta")}
        )
        for i in range(tokens)
    ]
    assert torch.equal(got, torch.cat(rows))
    assert torch.equal(together["state"], apart["state"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 4, 16, 66])
def test_repeatable(tokens, dtype, device):
    inputs = net_inputs(WIDE, tokens, dtype, device)
    first, second = clone(inputs), clone(inputs)
    assert torch.equal(gated_delta_net(**first), gated_delta_net(**second))
    for name in STATES:
        assert torch.equal(first[name], second[name])


def test_launches(device):
    for tokens, launches in ((1, 2), (4, 2), (5, 4)):
        with record_launches(run=True) as recorded:
            check("gated_delta_net", net_inputs(SMALL, tokens, torch.float32, device))
        assert len(recorded) == launches


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "tokens,valid", [(1, None), (4, 3), (16, None), (65, None), (129, None), (193, None), (70, 3)]
)
@pytest.mark.parametrize("shape", [GROUP_3, (1, 2, 32, 128, 2)])
def test_rule(shape, tokens, valid, dtype, device):
    """For one token and the second shape, several programs share a head."""
    check("gated_delta_rule", rule_inputs(shape, tokens, dtype, device), valid)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rule_with_one_key(dtype, device):
    """All tokens have the same key, nothing decays, and beta is 1: the matrix of a chunk has ones
    below its diagonal, and inverting it by a power series would lose all digits."""
    inputs = rule_inputs(WIDE, 100, dtype, device)
    inputs["k"].copy_(inputs["k"].select(0, 0).expand_as(inputs["k"]).clone())
    inputs["g"].zero_()
    inputs["beta"].fill_(1.0)
    check("gated_delta_rule", inputs)


def test_rule_at_extremes(device):
    """A decay to nothing within a chunk must not overflow, and a key of zeros has no direction."""
    inputs = rule_inputs(WIDE, 100, torch.float32, device)
    inputs["g"].mul_(torch.tensor([1.0, 200.0], device=device))
    inputs["k"].select(0, 5).zero_()
    inputs["q"].select(0, 7).zero_()
    inputs["v"].select(0, 9).mul_(1e4)
    check("gated_delta_rule", inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize(
    "tokens,valid",
    [(1, None), (2, None), (5, 1), (16, None), (33, 0), (33, 2), (65, None), (70, 64), (129, None)],
)
def test_conv(tokens, valid, taps, dtype, device):
    inputs = {
        "x": torch.randn(tokens, 140).to(device, dtype),
        "weight": torch.randn(140, taps).to(device, dtype),
        "state": torch.randn(SLOTS, taps - 1, 140).to(device, dtype),
        "slots": torch.tensor([SLOT], dtype=torch.int32, device=device),
    }
    check("causal_conv1d", inputs, valid)


VALID = (1, 0, 1, 1, 0)
"""Which sequences of a batch have a row."""


def make_batch(inputs: dict, *states: str) -> dict:
    """Arguments for one token of each sequence, counted, of inputs with as many rows. The slot of
    one sequence without a row does not exist."""
    slots, total = make_slots(len(VALID))
    slots[VALID.index(0)] = -1
    device = inputs["slots"].device
    pools = {n: torch.randn(total, *inputs[n].shape[1:]).to(inputs[n]) for n in states}
    counts = torch.tensor(VALID, device=device)
    return inputs | pools | {"slots": slots.to(device), "num_tokens": counts}


def check_batch(
    function, inputs: dict, rows: list[str], states: list[str], tolerance: float | None = None
) -> None:
    """Each sequence gets what it gets of the reference and, bit by bit, what it gets alone, without
    a count and in another slot. Under the interpreter, whose arithmetic is numpy's, the latter is
    only a hint that it holds on a GPU. Padding gives zeros and changes nothing. tolerance: that of
    the dtype by default."""
    together, expected = clone(inputs), clone(inputs)
    out = function(**together)
    reference = getattr(ops, function.__name__)(**expected)
    tolerance = tolerance or TOLERANCE[reference.dtype]
    valid = torch.tensor(VALID, device=out.device) == 1
    assert torch.count_nonzero(out[~valid]) == 0
    assert relative_error(out[valid], reference[valid]) < tolerance
    unused = torch.ones(len(inputs[states[0]]), dtype=torch.bool, device=out.device)
    unused[inputs["slots"][valid].long()] = False
    for name in states:
        assert relative_error(together[name], expected[name]) < tolerance, name
        assert torch.equal(together[name][unused], inputs[name][unused]), name
    for b in valid.nonzero().flatten().tolist():
        alone, slot = clone(inputs), int(inputs["slots"][b])
        alone |= {name: inputs[name][b : b + 1].clone() for name in rows}
        alone |= {name: inputs[name][[slot]] for name in states}
        alone |= {"slots": torch.zeros_like(inputs["slots"][:1]), "num_tokens": None}
        assert torch.equal(function(**alone)[0], out[b])
        for name in states:
            assert torch.equal(alone[name][0], together[name][slot]), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [GROUP_3, WIDE])
def test_batch(shape, dtype, device):
    inputs = make_batch(net_inputs(shape, len(VALID), dtype, device), *STATES)
    inputs["projected"][1] = float("nan")
    with record_launches(run=True) as recorded:
        gated_delta_net(**clone(inputs))
    assert len(recorded) == 2
    check_batch(gated_delta_net, inputs, ["projected"], list(STATES))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rule_of_a_batch(dtype, device):
    inputs = make_batch(rule_inputs((1, 2, 32, 64, 2), len(VALID), dtype, device), "state")
    check_batch(gated_delta_rule, inputs, ["q", "k", "v", "g", "beta"], ["state"])


@pytest.mark.parametrize("function", [causal_conv1d, gated_delta_net])
def test_several_rows_of_several_sequences(function, device):
    inputs = make_batch(net_inputs(SMALL, 2 * len(VALID), torch.float32, device), *STATES)
    if function is causal_conv1d:
        names = {"x": "projected", "weight": "conv_weight", "state": "conv_state", "slots": "slots"}
        inputs = {name: inputs[given] for name, given in names.items()}
    with pytest.raises(ValueError, match="10 rows of 5 sequences: expected one row of each"):
        function(**inputs)
