"""Gated delta nets of prompts of 2 to 16 tokens: which kernels they run, and which bits these give.

That bits are the same is only hinted at by the interpreter, whose arithmetic is numpy's; it is
shown on a GPU.
"""

import pytest
import torch
from test_gated_delta_net import GROUP_3, STATES, WIDE, net_inputs, rule_inputs
from test_versions_kernels import conv_inputs, copies, version, versioned
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from et_moe.backends.cuda.compile import _check_any_size, _size_in
from et_moe.backends.cuda.ranges import Range, split
from et_moe.backends.cuda.triton.cases.launches import Launch, record_launches
from et_moe.backends.cuda.triton.causal_conv1d.op import causal_conv1d
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net, gated_delta_rule

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CPU = torch.device("cpu")
START = 2
"""The version of its states that a prompt goes on from."""


def launches_of_a_range(op, inputs: dict, limits: Range) -> list[Launch]:
    """What is launched for any number of rows of a range; inputs are of one row."""
    rows = ("projected", "q", "k", "v", "g", "beta")
    shape_env = ShapeEnv()
    size = _size_in(limits, shape_env)
    with FakeTensorMode(shape_env=shape_env):
        given = {
            name: torch.empty((size, *x.shape[1:]) if name in rows else x.shape, dtype=x.dtype)
            for name, x in inputs.items()
        }
        given["num_tokens"] = torch.empty(1, dtype=torch.int64)
        with record_launches() as launches:
            op(**given)
    _check_any_size(limits, shape_env)
    return launches


@DTYPES
@pytest.mark.parametrize("limits", split(2, 64), ids=str)
def test_kernels_of_a_range(limits, dtype):
    """The largest number of rows decides, and the code is for all of them."""
    conv, chunks = "_causal_conv1d_kernel", ["prepare_kernel", "_scan_kernel"]
    net = launches_of_a_range(gated_delta_net, net_inputs(WIDE, 1, dtype, CPU), limits)
    rule = launches_of_a_range(gated_delta_rule, rule_inputs(WIDE, 1, dtype, CPU), limits)
    if limits.high <= 4:
        assert [x.name for x in net] == [conv, "_few_tokens_kernel"]
        assert [x.name for x in rule] == ["_few_tokens_kernel"]
        return
    assert [x.name for x in net] == [conv, *chunks, "_norm_kernel"]
    assert [x.name for x in rule] == chunks
    chunk = 16 if limits.high <= 16 or dtype == torch.float32 else 64
    logs = [x.arguments["LOG_CHUNK"] for x in (*net, *rule) if x.name in chunks]
    assert [1 << log for log in logs] == [chunk] * 4


@DTYPES
@pytest.mark.parametrize("shape", [GROUP_3, WIDE])
@pytest.mark.parametrize("tokens,valid", [(2, 2), (2, 1), (3, 3), *((4, n) for n in range(5))])
def test_rows_have_the_bits_of_one_after_the_other(tokens, valid, shape, dtype, device):
    """From a version, with padding that holds anything; what is left is version 0 of the slot.

    The convolution has one tap, since those of a prompt and of a token add up taps in two orders.
    """
    inputs = versioned(net_inputs(shape, tokens, dtype, device), 1)
    inputs["conv_weight"][:, :-1] = 0
    inputs["projected"][valid:] = float("nan")
    counts = torch.tensor([valid], device=device)
    where = {"num_tokens": counts, "versions": torch.full_like(counts, START)}
    together, slot = copies(inputs | where), int(inputs["slots"])
    out = gated_delta_net(**together)
    assert torch.count_nonzero(out[valid:]) == 0
    alone = inputs | {"slots": torch.zeros_like(inputs["slots"])}
    for name in STATES:
        alone[name] = version(name, inputs, inputs[name], slot, START)[None].clone()
    for r in range(valid):
        alone["projected"] = inputs["projected"][r : r + 1].contiguous()
        assert torch.equal(gated_delta_net(**alone)[0], out[r])
    expected = copies(inputs)
    for name in STATES if valid else ():
        version(name, inputs, expected[name], slot, 0).copy_(alone[name][0])
    for name in STATES:
        assert torch.equal(together[name], expected[name]), name


def test_a_bf16_state_is_rounded_behind_the_last_row_alone(device):
    """It is what the state of fp32 rounds to that goes on from the same numbers."""
    inputs = net_inputs(GROUP_3, 4, torch.float32, device)
    inputs["recurrent_state"] = inputs["recurrent_state"].bfloat16()
    exact = copies(inputs | {"recurrent_state": inputs["recurrent_state"].float()})
    assert torch.equal(gated_delta_net(**inputs), gated_delta_net(**exact))
    assert torch.equal(inputs["recurrent_state"], exact["recurrent_state"].bfloat16())


@DTYPES
@pytest.mark.parametrize("tokens", [2, 4, 5, 16])
def test_the_convolution_has_the_bits_of_long_prompts(tokens, dtype, reconfigure, device):
    inputs = conv_inputs(net_inputs(GROUP_3, tokens, dtype, device))
    short, long = copies(inputs), copies(inputs)
    got = causal_conv1d(**short)
    reconfigure("causal_conv1d", BLOCK_T=8, BLOCK_C=256)
    assert torch.equal(got, causal_conv1d(**long))
    assert torch.equal(short["state"], long["state"])
