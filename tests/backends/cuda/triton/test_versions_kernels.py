"""Kernels of states in versions, and of the rows of drafts, against references and single rows.

That a row has the bits that it has alone is only hinted at by the interpreter, whose arithmetic is
numpy's; it is shown on a GPU.
"""

import pytest
import torch
from sequences import make_slots
from test_gated_delta_net import (
    GROUP_3,
    SMALL,
    STATES,
    TOLERANCE,
    WIDE,
    clone,
    net_inputs,
    relative_error,
    rule_inputs,
)
from test_linear import weights

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.gated_delta_net import op as kernels
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net, gated_delta_rule
from et_moe.backends.cuda.triton.table import TRITON_OPS

VERSIONS = 4
VALID, START = (2, 0, 1, 4, 3), (3, 9, 0, 1, 2)
"""Valid rows of the sequences of a batch, of at most so many as a call has, and the versions that
they go on from. That of the sequence without valid rows does not exist, nor does its slot."""


def versioned(inputs: dict, sequences: int) -> dict:
    """Inputs whose states have versions, and as many slots as sequences need."""
    slots, total = make_slots(sequences)
    pools = {}
    for name in ("conv_state", "recurrent_state", "state"):
        if name not in inputs:
            continue
        _, *shape = inputs[name].shape
        is_conv = len(shape) == 2
        shape = [shape[0] + VERSIONS - 1, shape[1]] if is_conv else [VERSIONS, *shape]
        pools[name] = torch.randn(total, *shape).to(inputs[name])
    return inputs | pools | {"slots": slots.to(inputs["slots"].device)}


def conv_inputs(inputs: dict) -> dict:
    """The convolution of a gated delta net's inputs."""
    names = {"weight": "conv_weight", "state": "conv_state", "slots": "slots"}
    x = inputs["projected"][:, : len(inputs["conv_weight"])].contiguous()
    return {"x": x} | {name: inputs[given] for name, given in names.items()}


def drafts(inputs: dict, rows: int, device) -> dict:
    """A call of several rows of each sequence, all of which leave versions."""
    inputs = versioned(inputs, len(VALID))
    inputs["slots"][VALID.index(0)] = -1
    counts = torch.tensor([min(n, rows) for n in VALID], device=device)
    where = {"num_tokens": counts, "versions": torch.tensor(START, device=device)}
    return inputs | where | {"each_row": True}


def copies(inputs: dict) -> dict:
    return {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def row_names(inputs: dict) -> list[str]:
    return [n for n in ("projected", "x", "q", "k", "v", "g", "beta") if n in inputs]


def state_names(inputs: dict) -> list[str]:
    return [n for n in ("conv_state", "recurrent_state", "state") if n in inputs]


def version(name: str, inputs: dict, pool: torch.Tensor, slot: int, number: int) -> torch.Tensor:
    if pool.dim() == 3:
        taps = inputs["conv_weight" if name == "conv_state" else "weight"].shape[1]
        return pool[slot, number : number + taps - 1]
    return pool[slot, number]


def check_drafts(function, inputs: dict, rows: int, tolerance: float | None = None) -> None:
    """Compares with the reference, and with calls of one row each, one after the other, in states
    without versions. tolerance: that of the dtype by default."""
    together, expected = copies(inputs), copies(inputs)
    out, reference = function(**together), getattr(ops, function.__name__)(**expected)
    tolerance, each = tolerance or TOLERANCE[reference.dtype], (len(VALID), rows)
    out, reference = out.unflatten(0, each), reference.unflatten(0, each)
    names = state_names(inputs)
    for name in names:
        assert relative_error(together[name], expected[name]) < tolerance, name
        kept = expected[name] == inputs[name]
        assert torch.equal(together[name][kept], inputs[name][kept]), name
    for b, valid in enumerate(inputs["num_tokens"].tolist()):
        if function is not causal_conv1d:
            assert torch.count_nonzero(out[b, valid:]) == 0
        if valid == 0:
            continue
        assert relative_error(out[b, :valid], reference[b, :valid]) < tolerance
        slot, start = int(inputs["slots"][b]), START[b]
        alone = {n: v for n, v in inputs.items() if n not in ("versions", "each_row")}
        alone |= {"slots": torch.zeros_like(inputs["slots"][:1]), "num_tokens": None}
        for name in names:
            alone[name] = version(name, inputs, inputs[name], slot, start)[None].clone()
        for r in range(valid):
            for name in row_names(inputs):
                alone[name] = inputs[name].unflatten(0, each)[b, r : r + 1].contiguous()
            assert torch.equal(function(**alone)[0], out[b, r])
            for name in names:
                left = version(name, inputs, together[name], slot, r)
                assert torch.equal(left, alone[name][0]), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [GROUP_3, SMALL])
def test_net(shape, rows, dtype, device):
    inputs = drafts(net_inputs(shape, rows * len(VALID), dtype, device), rows, device)
    inputs["projected"].unflatten(0, (-1, rows))[1] = float("nan")
    with record_launches(run=True) as recorded:
        gated_delta_net(**copies(inputs))
    assert len(recorded) == 2
    check_drafts(gated_delta_net, inputs, rows)


def test_net_of_true_head_size(device):
    inputs = net_inputs((1, 2, 128, 128, 4), 3 * len(VALID), torch.bfloat16, device)
    check_drafts(gated_delta_net, drafts(inputs, 3, device), 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [2, 3])
def test_rule(rows, dtype, device):
    """Several programs share a head."""
    inputs = rule_inputs((1, 2, 32, 64, 2), rows * len(VALID), dtype, device)
    check_drafts(gated_delta_rule, drafts(inputs, rows, device), rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("rows", [2, 4])
def test_conv(rows, taps, dtype, device):
    shape = (*GROUP_3[:4], taps)
    inputs = conv_inputs(net_inputs(shape, rows * len(VALID), dtype, device))
    check_drafts(causal_conv1d, drafts(inputs, rows, device), rows)


@pytest.mark.parametrize("function", [causal_conv1d, gated_delta_net])
@pytest.mark.parametrize("number", [-(2**40), -1, VERSIONS, 2**40])
def test_versions_that_there_are_not(function, number, device):
    """They count as the first or the last, since nothing may be read beside the pool."""
    inputs = net_inputs(SMALL, 2, torch.float32, device)
    inputs = versioned(inputs if function is gated_delta_net else conv_inputs(inputs), 1)
    nearest = min(max(number, 0), VERSIONS - 1)
    results = []
    for n in (number, nearest):
        given = copies(inputs) | {"versions": torch.tensor([n], device=device), "each_row": True}
        results.append([function(**given), *(given[name] for name in state_names(given))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens,valid", [(1, 1), (1, 0), (2, 2), (5, 1), (33, 0), (70, 67)])
def test_a_prompt_goes_on_from_a_version(tokens, valid, dtype, device):
    """It leaves version 0, and nothing else changes; nor does anything without a valid row."""
    inputs = versioned(net_inputs(WIDE, tokens, dtype, device), 1)
    inputs |= {"num_tokens": torch.tensor([valid], device=device)}
    inputs |= {"versions": torch.tensor([2], device=device)}
    got_inputs, expected_inputs = copies(inputs), copies(inputs)
    got, expected = gated_delta_net(**got_inputs), ops.gated_delta_net(**expected_inputs)
    if valid:
        assert relative_error(got[:valid], expected[:valid]) < TOLERANCE[dtype]
    for name in STATES:
        assert relative_error(got_inputs[name], expected_inputs[name]) < TOLERANCE[dtype], name
        kept = expected_inputs[name] == inputs[name]
        assert torch.equal(got_inputs[name][kept], inputs[name][kept]), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [3, 70])
def test_a_prompt_has_the_bits_that_it_has_without_versions(tokens, dtype, device):
    inputs = versioned(net_inputs(WIDE, tokens, dtype, device), 1)
    slot = int(inputs["slots"])
    plain = {n: version(n, inputs, inputs[n], slot, 3)[None].clone() for n in STATES}
    plain = copies(inputs) | plain | {"slots": torch.zeros_like(inputs["slots"])}
    given = copies(inputs) | {"versions": torch.tensor([3], device=device)}
    assert torch.equal(gated_delta_net(**given), gated_delta_net(**plain))
    for name in STATES:
        assert torch.equal(version(name, given, given[name], slot, 0), plain[name][0]), name


def run_projected(net: dict, op: str, packed: tuple, x, norm, launches: int) -> torch.Tensor:
    """`gated_delta_net_projected` of an op's weight, which takes so many launches."""
    group = (*packed, None)[:3]  # without a group size: INT8
    with record_launches(run=True) as recorded:
        out = kernels.gated_delta_net_projected(x, *group, norm, 1e-5, 1, **net, eps=1e-4)
    assert len(recorded) == launches
    return out


def check_projected(net: dict, op: str, k: int, rows: int, dtype, launches: int = 2) -> None:
    """Compares with the kernels of the two ops, one after the other."""
    device = net["conv_weight"].device
    n = net.pop("projected").shape[1]
    _, packed = weights(op, n, k, 128, device, size=k**-0.5)
    x, norm = torch.randn(rows, k).to(device, dtype), torch.randn(k).to(device, dtype)
    fused, composed = copies(net), copies(net)
    got = run_projected(fused, op, packed, x, norm, launches)
    y = TRITON_OPS[op](x, *packed, norm, 1e-5)
    assert torch.equal(got, gated_delta_net(y, **composed, eps=1e-4))
    for name in STATES:
        assert torch.equal(fused[name], composed[name]), name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_with_its_projection(dtype, device):
    """In two launches as in three, from any version."""
    for start in range(VERSIONS):
        net = versioned(net_inputs(GROUP_3, 1, dtype, device), 1)
        net |= {"versions": torch.tensor([start], device=device)}
        check_projected(net, "linear_w4a8", 256, 1, dtype)


def sequences(shape, counts: list[int], rows: int, dtype, device) -> dict:
    """A call with so many valid rows of each sequence, each of which leaves a version; sequences
    without any have no slot."""
    inputs = versioned(net_inputs(shape, rows * len(counts), dtype, device), len(counts))
    inputs["slots"][torch.tensor(counts, device=device) == 0] = -1
    counts = torch.tensor(counts, device=device)
    starts = torch.arange(len(counts), device=device) % VERSIONS
    return inputs | {"num_tokens": counts, "versions": 3 - starts, "each_row": True}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("op,taps", [("linear_w4a8", 4), ("linear_w4a8", 2), ("linear_w8a8", 3)])
@pytest.mark.parametrize(
    "rows,counts", [(2, [2]), (3, [3]), (4, [4]), (3, [1]), (2, [0]), (2, [2, 1]), (1, [1, 0, 1])]
)
def test_drafts_with_their_projection(rows, counts, taps, op, dtype, device):
    """In two launches as in three: all rows and some of one sequence and of several, from any
    version; the last program overlaps its neighbour."""
    net = sequences((*GROUP_3[:4], taps), counts, rows, dtype, device)
    check_projected(net, op, 256, rows * len(counts), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("versions", [False, True])
def test_a_batch_with_its_projection(versions, dtype, device):
    """A token of each of four sequences, one of which is padding."""
    net = sequences(GROUP_3, [1, 1, 0, 1], 1, dtype, device) | {"each_row": False}
    if not versions:
        del net["versions"]
        net["conv_state"] = net["conv_state"][:, : 1 - VERSIONS].contiguous()
        net["recurrent_state"] = net["recurrent_state"][:, 0].contiguous()
    check_projected(net, "linear_w4a8", 256, 4, dtype)


@pytest.mark.parametrize("start", range(VERSIONS))
def test_drafts_with_their_projection_from_a_version(start, device):
    net = sequences(GROUP_3, [3], 3, torch.bfloat16, device)
    net["versions"].fill_(start)
    check_projected(net, "linear_w4a8", 256, 3, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_drafts_with_their_projection_as_single_tokens(dtype, device):
    """Rows have the bits of calls of one row, one after the other, and leave what those leave."""
    rows, start, op, k = 3, 2, "linear_w4a8", 256
    net = sequences(GROUP_3, [rows], rows, dtype, device)
    n = net.pop("projected").shape[1]
    net["versions"].fill_(start)
    _, packed = weights(op, n, k, 128, device, size=k**-0.5)
    x, norm = torch.randn(rows, k).to(device, dtype), torch.randn(k).to(device, dtype)
    together, slot = copies(net), int(net["slots"])
    out = run_projected(together, op, packed, x, norm, 2)
    alone = {name: v for name, v in net.items() if name not in ("versions", "each_row")}
    alone |= {"slots": torch.zeros_like(net["slots"]), "num_tokens": None}
    for name in STATES:
        alone[name] = version(name, net, net[name], slot, start)[None].clone()
    for r in range(rows):
        assert torch.equal(run_projected(alone, op, packed, x[r : r + 1], norm, 2)[0], out[r])
        for name in STATES:
            left = version(name, net, together[name], slot, r)
            assert torch.equal(left, alone[name][0]), name


@pytest.mark.parametrize("repeat,op", [(8, "linear_w4a8"), (1, "linear_w4a16")])
def test_rows_that_are_convolved_apart(repeat, op, reconfigure, device):
    """Several blocks a program, or 16-bit activations, leave no place for it."""
    reconfigure("_gemv", REPEAT=repeat)
    planes = 1 if op == "linear_w4a8" else 2
    net = sequences(GROUP_3, [2], 2, torch.float32, device)
    n = net.pop("projected").shape[1]
    _, packed = weights(op, n, 256, 128, device)
    x, composed = torch.randn(2, 256, device=device), copies(net)
    with record_launches(run=True) as recorded:
        got = kernels.gated_delta_net_projected(x, *packed, None, 1e-5, planes, **net, eps=1e-4)
    assert len(recorded) == 4
    y = TRITON_OPS[op](x, *packed, None, 1e-5)
    assert torch.equal(got, gated_delta_net(y, **composed, eps=1e-4))


def test_refuses_rows(device):
    inputs = versioned(net_inputs(SMALL, 5, torch.float32, device), 1)
    inputs |= {"versions": torch.tensor([0], device=device)}
    with pytest.raises(ValueError, match="5 rows of 1 sequences: expected 1 to 4 rows of each"):
        gated_delta_net(**inputs, each_row=True)
    few = clone(inputs) | {"recurrent_state": inputs["recurrent_state"].narrow(1, 0, 2)}
    few |= {"conv_state": inputs["conv_state"][:, : few["conv_state"].shape[1] - 2].contiguous()}
    few["projected"] = inputs["projected"][:3].contiguous()
    with pytest.raises(ValueError, match="3 rows of a sequence leave as many versions, there are"):
        gated_delta_net(**few, each_row=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows,columns", [(1, 96), (3, 200), (5, 2048)])
def test_rms_norm(rows, columns, dtype, device):
    """A row has the bits that it has alone."""
    x, weight = torch.randn(rows, columns).to(device, dtype), torch.randn(columns).to(device, dtype)
    got = TRITON_OPS["rms_norm"](x, weight, 1e-5)
    assert relative_error(got, ops.rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]
    assert got.dtype == dtype
    for row, result in zip(x, got, strict=True):
        assert torch.equal(TRITON_OPS["rms_norm"](row[None], weight, 1e-5)[0], result)
