"""Gated delta net kernels whose recurrent state is bf16, which is rounded where it is left and
behind every page of rows.

That bits are the same is only hinted at by the interpreter, whose arithmetic is numpy's; it is
shown on a GPU.
"""

import pytest
import torch
from test_gated_delta_net import (
    GROUP_3,
    SMALL,
    STATES,
    VALID,
    WIDE,
    check_batch,
    clone,
    counted,
    make_batch,
    net_inputs,
    relative_error,
    rule_inputs,
)
from test_versions_kernels import check_drafts, copies, drafts, versioned

from et_moe.backends import ops
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net, gated_delta_rule
from et_moe.backends.ops import PAGE_SIZE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = 5e-3
"""The relative L2 error that is allowed: where a number lies between two of bf16, either may be
taken."""


def rounded(inputs: dict) -> dict:
    """Inputs with a recurrent state of bf16."""
    name = "state" if "state" in inputs else "recurrent_state"
    return inputs | {name: inputs[name].bfloat16()}


def check_state(got: torch.Tensor, expected: torch.Tensor, most: float = 0.03) -> None:
    """All but a few numbers are the same, and those are neighbours: a state that is rounded less
    often would differ in many."""
    assert got.dtype == expected.dtype == torch.bfloat16
    got, expected = got.float(), expected.float()
    other = got != expected
    assert other.float().mean() < most
    scale = expected.abs().amax(-1, keepdim=True)
    assert ((got - expected).abs() <= expected.abs() * 2**-7 + scale * 1e-4).all()


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 17, 63, 64, 65, 129, 193])
def test_lengths(tokens, dtype, device):
    """Products of a bf16 model round more than the state does."""
    inputs = rounded(net_inputs(SMALL, tokens, dtype, device))
    got_inputs, expected_inputs = clone(inputs), clone(inputs)
    got, expected = gated_delta_net(**got_inputs), ops.gated_delta_net(**expected_inputs)
    assert relative_error(got, expected) < TOLERANCE
    states = [given["recurrent_state"] for given in (got_inputs, expected_inputs)]
    assert relative_error(*states) < TOLERANCE
    if dtype == torch.float32 or tokens == 1:
        check_state(*states)


@DTYPES
@pytest.mark.parametrize(
    "tokens,valid",
    [(4, 0), (4, 3), (16, 0), (16, 9), (40, 0), (80, 1), (80, 64), (130, 65), (130, 128)],
)
def test_padding(tokens, valid, dtype, device):
    """It counts for nothing: the bits are those of the valid rows alone."""
    inputs = rounded(net_inputs(GROUP_3, tokens, dtype, device))
    padded = clone(inputs)
    out = gated_delta_net(**counted(padded, valid))
    assert torch.count_nonzero(out[valid:]) == 0
    if valid == 0:
        assert all(torch.equal(padded[name], inputs[name]) for name in STATES)
        return
    expected = clone(inputs)
    ops.gated_delta_net(**counted(expected, valid))
    assert relative_error(padded["recurrent_state"], expected["recurrent_state"]) < TOLERANCE


@DTYPES
@pytest.mark.parametrize("cuts", [(64, 64, 5), (128, 5), (64, 69)])
def test_a_cut_behind_pages_changes_no_bit(cuts, dtype, device):
    """Of a fp32 model none but numpy's, whose products depend on how operands lie in memory."""
    inputs = rounded(net_inputs(GROUP_3, 2 * PAGE_SIZE + 5, dtype, device))
    whole, pieces = clone(inputs), clone(inputs)
    expected = gated_delta_net(**whole)
    results = [
        gated_delta_net(**pieces | {"projected": piece.contiguous()})
        for piece in inputs["projected"].split(cuts)
    ]
    if dtype == torch.float32:
        assert relative_error(torch.cat(results), expected) < 1e-5
        check_state(pieces["recurrent_state"], whole["recurrent_state"], 0.001)
    else:
        assert torch.equal(torch.cat(results), expected)
        assert all(torch.equal(pieces[name], whole[name]) for name in STATES)


@DTYPES
@pytest.mark.parametrize("shape", [GROUP_3, (1, 2, 128, 128, 4)])
def test_batch(shape, dtype, device):
    inputs = make_batch(rounded(net_inputs(shape, len(VALID), dtype, device)), *STATES)
    check_batch(gated_delta_net, inputs, ["projected"], list(STATES), TOLERANCE)


@DTYPES
def test_rule_of_a_batch(dtype, device):
    """Several programs share a head."""
    inputs = rounded(rule_inputs((1, 2, 32, 64, 2), len(VALID), dtype, device))
    inputs = make_batch(inputs, "state")
    check_batch(gated_delta_rule, inputs, ["q", "k", "v", "g", "beta"], ["state"], TOLERANCE)


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_of_drafts(rows, dtype, device):
    """Each goes on from the version that the one before it left, as it does alone."""
    inputs = rounded(net_inputs(SMALL, rows * len(VALID), dtype, device))
    check_drafts(gated_delta_net, drafts(inputs, rows, device), rows, TOLERANCE)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_a_prompt_goes_on_from_a_version(tokens, dtype, device):
    inputs = rounded(versioned(net_inputs(WIDE, tokens, dtype, device), 1))
    inputs |= {"versions": torch.tensor([2], device=device)}
    got, expected = copies(inputs), copies(inputs)
    out, reference = gated_delta_net(**got), ops.gated_delta_net(**expected)
    assert relative_error(out, reference) < TOLERANCE
    for name in STATES:
        assert relative_error(got[name], expected[name]) < TOLERANCE, name
    kept = expected["recurrent_state"] == inputs["recurrent_state"]
    kept[:, 0] = False
    assert torch.equal(got["recurrent_state"][kept], inputs["recurrent_state"][kept])
