"""The mixture of experts with INT8 and with float weights against its eager references."""

import pytest
import torch
from expert_tables import TOLERANCE, int8_or_dense, relative_error

from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.tuning import tuning_target

NAMES = ["moe_w8a8", "moe_w8a16", "moe"]
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: 0.003}


@pytest.fixture(autouse=True)
def _few_programs(reconfigure, device):
    """Makes programs large, as the interpreter takes the same time for a program of any size."""
    if device.type == "cpu":
        reconfigure("_decode_", BLOCK_N=64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 17, 33])
def test_tokens(name, tokens, device):
    experts = int8_or_dense(name, 4, 128, 64, torch.float32, device)
    got, expected = experts.run(name, *experts.inputs(tokens, 2))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [2, 18])
@pytest.mark.parametrize(
    "hidden,inner,dtype",
    [
        (64, 32, torch.float32),
        (75, 37, torch.bfloat16),
        (96, 160, torch.bfloat16),
        (320, 192, torch.float32),
        (128, 256, torch.bfloat16),
    ],
)
def test_shapes(name, tokens, hidden, inner, dtype, device):
    """Widths around the tiles of activations, of which there are one or three kinds between the
    products, and around the blocks of weights."""
    experts = int8_or_dense(name, 3, hidden, inner, dtype, device)
    x, weights, ids = experts.inputs(tokens, 2)
    got, expected = experts.run(name, x.to(dtype), weights, ids, x.to(dtype))
    assert relative_error(got, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [3, 17])
def test_routing(name, tokens, device):
    """All tokens go to one expert, experts stay empty, slots and rows are skipped, ids lie outside
    of the tables, a token has an id twice, and a residual is added."""
    experts = int8_or_dense(name, 6, 128, 64, torch.float32, device)
    x, weights, ids = experts.inputs(tokens, 3)
    residual = torch.randn_like(x)
    ids[:, 0] = 4
    ids[:, 1:] = ids[:, 1:].clamp(1, 4)
    ids[0, 1:] = torch.tensor([6, 2**31 - 1])
    ids[1, 1:] = torch.tensor([-1, -7])
    ids[2] = -1
    got, expected = experts.run(name, x, weights, ids.long(), residual)
    assert torch.equal(got[2], residual[2])
    assert relative_error(got - residual, expected - residual) < 10 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [4, 20])
def test_padded_bucket(name, tokens, device):
    """One token is valid, or none, and the rows of padding hold what must not be looked at."""
    experts = int8_or_dense(name, 4, 128, 64, torch.float32, device)
    x, weights, ids = experts.inputs(tokens, 2)
    x[1:], weights[1:], ids[1:] = float("nan"), 0.0, -1
    got = experts.launch(name, x, weights, ids)
    _, expected = experts.run(name, x[:1], weights[:1], ids[:1])
    assert relative_error(got[:1], expected) < TOLERANCE
    assert not got[1:].any()
    assert not experts.launch(name, x, weights, torch.full_like(ids, -1)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [4, 20])
def test_extreme_values(name, tokens, device):
    """Rows of activations are zero, denormal or huge, and routing weights go from 1e-30 to 1e8."""
    experts = int8_or_dense(name, 4, 128, 64, torch.bfloat16, device)
    x, weights, ids = experts.inputs(tokens, 2)
    x = x.bfloat16()
    x[0], x[1], x[2] = 0.0, x[1] * 1e-41, x[2] * 1e12
    weights[3, 0], weights[3, 1] = 1e8, 1e-30
    got, expected = experts.run(name, x, weights, ids)
    for row in range(tokens):
        # Dense experts round between the products, and a row scatters more than a batch.
        assert relative_error(got[row], expected[row]) < max(10 * TOLERANCE, 0.005), row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [[1, 2, 4], [5, 9, 16], [17, 33]])
def test_rows_do_not_depend_on_others(tokens, name, device):
    """A token gets the same bits among any number of others that take the same kernels, wherever
    it stands and whatever experts these take. The configurations are an H200's.

    Under the interpreter, which adds as numpy does, this is only a hint that it holds on a GPU."""
    experts = int8_or_dense(name, 4, 256, 128, torch.bfloat16, device)
    x, weights, ids = experts.inputs(max(tokens), 3)
    x, residual = x.bfloat16(), torch.randn_like(x).bfloat16()
    ids[-1] = -1
    with tuning_target("NVIDIA H200", "sm_90"):
        expected = experts.launch(name, x, weights, ids, residual)
        for count in tokens:
            rows = torch.randperm(max(tokens))[:count].tolist()
            got = experts.launch(name, x[rows], weights[rows], ids[rows], residual[rows])
            assert torch.equal(got, expected[rows]), rows


@pytest.mark.parametrize("tokens", [2, 17])
def test_bf16_weights_and_fp32_activations(tokens, device):
    """Numbers of bf16 lose nothing in fp32."""
    experts = int8_or_dense("moe", 3, 128, 64, torch.bfloat16, device)
    got, expected = experts.run("moe", *experts.inputs(tokens, 2))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name,launches", [("moe_w8a8", 5), ("moe_w8a16", 4), ("moe", 4)])
def test_launches(name, launches, device):
    experts = int8_or_dense(name, 2, 128, 64, torch.float32, device)
    few = 4 if name == "moe_w8a8" else 2
    for tokens, count in ((1, 2), (4, 2), (5, few), (16, few), (17, launches)):
        with record_launches() as found:
            experts.launch(name, *experts.inputs(tokens, 1))
        assert len(found) == count
