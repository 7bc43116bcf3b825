"""The mixture of experts with INT4 weights against its eager references; `test_moe_formats.py` has
the others.

Activations are fp32 unless a test is about bf16: in fp32 the comparison shows the arithmetic
without the rounding of the result.
"""

import pytest
import torch
from expert_tables import TOLERANCE, Experts, relative_error

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.moe import op as moe
from et_moe.backends.cuda.triton.moe.routing import route
from et_moe.backends.cuda.triton.table import TRITON_OPS
from et_moe.backends.cuda.triton.tuning import read_table, tuning_target

NAMES = ["moe_w4a8", "moe_w4a16"]
DTYPES = [(torch.float32, TOLERANCE), (torch.bfloat16, 0.003)]


@pytest.fixture(autouse=True)
def _few_programs(reconfigure, device):
    """Makes programs large, as the interpreter takes the same time for a program of any size."""
    if device.type == "cpu":
        reconfigure("_decode_", BLOCK_N=64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 31, 64, 65, 129])
def test_tokens(name, tokens, device):
    experts = Experts(4, 128, 64, 64, device)
    got, expected = experts.run(name, *experts.inputs(tokens, 2))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [2, 18])
@pytest.mark.parametrize(
    "hidden,inner,group",
    [
        (64, 32, 32),
        (96, 160, 32),
        (256, 128, 32),
        (64, 64, 64),
        (320, 192, 64),
        (384, 128, 128),
        (128, 256, 128),
    ],
)
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_shapes_and_groups(name, tokens, hidden, inner, group, dtype, tolerance, device):
    experts = Experts(3, hidden, inner, group, device)
    x, weights, ids = experts.inputs(tokens, 2)
    got, expected = experts.run(name, x.to(dtype), weights, ids)
    assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [2, 18])
@pytest.mark.parametrize("hidden,inner,group", [(96, 160, 32), (320, 192, 64), (128, 256, 128)])
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_float16_scales(name, tokens, hidden, inner, group, dtype, tolerance, device):
    experts = Experts(3, hidden, inner, group, device, torch.float16)
    x, weights, ids = experts.inputs(tokens, 2)
    got, expected = experts.run(name, x.to(dtype), weights, ids)
    assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("tokens", [2, 17])
def test_true_width(tokens, device):
    """Hidden 2048 and expert width 512, with group 128, as in Qwen3.5-35B-A3B."""
    experts = Experts(2, 2048, 512, 128, device)
    x, weights, ids = experts.inputs(tokens, 1)
    got, expected = experts.run("moe_w4a8", x, weights, ids)
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize(
    "tokens,hidden,inner,count,top_k,group",
    [
        # ExecuTorch's own shapes
        (8, 64, 32, 4, 2, 32),
        (16, 64, 32, 8, 4, 32),
        (32, 128, 64, 8, 2, 64),
        (64, 64, 32, 4, 2, 32),
        (128, 128, 64, 8, 2, 32),
        (256, 128, 64, 8, 2, 32),
        (128, 2048, 512, 8, 2, 128),
        # Qwen3.5-35B-A3B
        (6, 2048, 512, 256, 8, 128),
        (18, 2048, 512, 256, 8, 128),
    ],
)
def test_accuracy(tokens, hidden, inner, count, top_k, group, device):
    """Compares bf16 results with the same arithmetic and with activations that are not quantized.

    The error against the latter varies by token, (1.45 +- 0.1)%, so one token is not enough.
    """
    experts = Experts(count, hidden, inner, group, device)
    x, weights, ids = experts.inputs(tokens, top_k)
    if tokens > 16 and count > 64:
        ids = ids % 8 * 36 + 3  # few experts, as the interpreter takes its time for each expert
    got, expected = experts.run("moe_w4a8", x.bfloat16(), weights, ids)
    unquantized = ops.moe_w4a16(x.bfloat16(), *experts.bundle, weights, ids, group)
    assert relative_error(got, expected) < 0.003
    assert relative_error(got, unquantized) < 0.015


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [3, 33])
def test_routing(name, tokens, device):
    """All tokens go to one expert, experts stay empty, slots and rows are skipped, a token has an
    id twice, and a residual is added."""
    experts = Experts(6, 128, 64, 64, device)
    x, weights, ids = experts.inputs(tokens, 3)
    residual = torch.randn_like(x)
    ids[:, 0] = 4  # every token, as if it were a shared expert; experts 0 and 5 stay empty
    ids[:, 1:] = ids[:, 1:].clamp(1, 4)
    ids[1, 1:] = -1
    ids[2] = -1
    got, expected = experts.run(name, x, weights, ids.long(), residual)
    assert torch.equal(got[2], residual[2])
    assert relative_error(got - residual, expected - residual) < 10 * TOLERANCE


@pytest.mark.parametrize("tokens", [4, 20])
def test_padded_bucket(tokens, device):
    """One token is valid, and the rows of padding hold what must not be looked at."""
    experts = Experts(4, 128, 64, 64, device)
    x, weights, ids = experts.inputs(tokens, 2)
    x[1:], weights[1:], ids[1:] = float("nan"), 0.0, -1
    got = moe.moe_w4a8(x, *experts.prepacked, weights, ids, 64)
    _, expected = experts.run("moe_w4a8", x[:1], weights[:1], ids[:1])
    assert relative_error(got[:1], expected) < TOLERANCE
    assert not got[1:].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_extreme_values(name, tokens, dtype, tolerance, device):
    """Rows of activations are zero, denormal or huge, and routing weights go from 1e-30 to 1e8."""
    experts = Experts(4, 128, 64, 64, device)
    x, weights, ids = experts.inputs(tokens, 2)
    x = x.to(dtype)
    x[0], x[1], x[2] = 0.0, x[1] * 1e-41, x[2] * 1e12
    weights[3, 0], weights[3, 1] = 1e8, 1e-30
    got, expected = experts.run(name, x, weights, ids)
    for row in range(tokens):
        assert relative_error(got[row], expected[row]) < max(10 * TOLERANCE, tolerance), row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [3, 20])
def test_bf16(name, tokens, device):
    experts = Experts(4, 128, 64, 64, device)
    x, weights, ids = experts.inputs(tokens, 2)
    got, expected = experts.run(name, x.bfloat16(), weights, ids, x.bfloat16())
    assert relative_error(got, expected) < 0.003


@pytest.mark.parametrize("tokens", [3, 40])
def test_repeatable(tokens, device):
    experts = Experts(4, 128, 64, 64, device)
    inputs = experts.inputs(tokens, 2)
    first, _ = experts.run("moe_w4a8", *inputs)
    second, _ = experts.run("moe_w4a8", *inputs)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [[1, 2, 4], [5, 9, 16], [17, 33]])
def test_rows_do_not_depend_on_others(tokens, dtype, name, device):
    """A token gets the same bits among any number of others that take the same kernels, wherever
    it stands and whatever experts these take. The configurations are an H200's.

    Under the interpreter, which adds as numpy does, this is only a hint that it holds on a GPU."""
    experts = Experts(4, 1024, 256, 128, device)
    x, weights, ids = experts.inputs(max(tokens), 3)
    x, residual = x.to(dtype), torch.randn_like(x).to(dtype)
    ids[-1] = -1

    def run(rows):
        packed = (*experts.prepacked, weights[rows], ids[rows], experts.group, residual[rows])
        return TRITON_OPS[name](x[rows], *packed)

    with tuning_target("NVIDIA H200", "sm_90"):
        expected = run(list(range(max(tokens))))
        for count in tokens:
            rows = torch.randperm(max(tokens))[:count].tolist()
            assert torch.equal(run(rows), expected[rows]), rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["decode_gate_up", "decode_down"])
def test_the_order_of_additions_does_not_depend_on_the_number_of_tokens(kernel, name):
    """It follows from these parts of a configuration; only the others may vary with the tokens."""
    for gpu, entries in read_table(f"{name}_{kernel}").entries.items():
        orders = {
            tuple(entry.config[key] for key in ("BLOCK_T", "LANES", "num_warps"))
            for entry in entries
        }
        assert len(orders) == 1, gpu


@pytest.mark.parametrize("block_m", [32, 64, 128])
def test_blocks_of_pairs(block_m, reconfigure, device):
    """Every size of block that a tuning table may name."""
    experts = Experts(3, 128, 64, 64, device)
    reconfigure("_route", BLOCK_M=block_m)
    got, expected = experts.run("moe_w4a8", *experts.inputs(70, 2))
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("tokens,block_m,chunk", [(1, 16, 32), (37, 16, 64), (64, 32, 32)])
def test_route(tokens, block_m, chunk, device):
    """Every valid pair stands exactly once, in a block of its expert."""
    ids = torch.randint(-1, 7, (tokens, 3), device=device, dtype=torch.int32)
    ids[ids == 5] = 2  # an expert with no token
    config = {"BLOCK_M": block_m, "CHUNK": chunk, "num_warps": 4}
    rows, block_experts = route(ids, 7, config)
    rows = rows.reshape(-1, block_m)
    assert rows.shape[0] == block_experts.shape[0]
    flat, found = ids.flatten(), []
    for block, expert in zip(rows, block_experts.tolist(), strict=True):
        if expert >= 0:
            pairs = block[block >= 0]
            assert (flat[pairs] == expert).all() and len(pairs) > 0
            found += pairs.tolist()
    assert sorted(found) == (flat >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("tokens,kernels", [(1, 2), (4, 2), (5, 4), (16, 4), (17, 5)])
def test_launches(tokens, kernels, device):
    experts = Experts(2, 128, 64, 64, device)
    x, weights, ids = experts.inputs(tokens, 1)
    with record_launches() as launches:
        moe.moe_w4a8(x, *experts.prepacked, weights, ids, 64)
    assert len(launches) == kernels
