"""Kernels of linear layers with INT4 and INT8 weights against their eager references."""

import pytest
import torch
import triton
from linear_weights import INT8, weights

from et_moe.backends import ops
from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.linear.decode_rows import supports_rows
from et_moe.backends.cuda.triton.linear.layout import prepack_linear
from et_moe.backends.cuda.triton.linear.op import linear_w4a8, linear_w8a8
from et_moe.backends.cuda.triton.table import TRITON_OPS

# The relative L2 error that is allowed against the reference with fp32 activations.
TOLERANCE = {"linear_w4a8": 1e-5, "linear_w4a16": 2e-4, "linear_w8a8": 1e-5, "linear_w8a16": 2e-4}
INT4 = ["linear_w4a8", "linear_w4a16"]
ROWS = [1, 2, 3, 15, 16, 17, 31, 64, 65, 129]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def run(name, x, n, group, device, scale_dtype=torch.bfloat16, **options):
    """The result of an op's kernel, and that of its reference."""
    bundle, prepacked = weights(name, n, x.shape[1], group, device, scale_dtype)
    got = TRITON_OPS[name](x, *prepacked, **options)
    assert got.dtype == x.dtype
    return got, getattr(ops, name)(x, *bundle, **options)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("m", ROWS)
def test_rows(name, m, device):
    x = torch.randn(m, 256, device=device)
    got, expected = run(name, x, 48, 128, device)
    assert relative_error(got, expected) < TOLERANCE[name]


SHAPES = [
    (k, g) for k in (32, 64, 96, 128, 192, 256, 384, 512) for g in ops.GROUP_SIZES if k % g == 0
]


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("k", [40, 96, 128, 200, 256, 301, 384, 1024])
@pytest.mark.parametrize("m", [1, 3])
def test_columns_of_int8(name, m, k, device):
    x = torch.randn(m, k, device=device)
    norm, residual = torch.randn(k, device=device), torch.randn(m, 40, device=device)
    got, expected = run(name, x, 40, None, device, norm_weight=norm, eps=1e-5, residual=residual)
    assert relative_error(got, expected) < TOLERANCE[name]


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("k,group", SHAPES)
@pytest.mark.parametrize("m", [1, 3])
def test_columns_and_groups(name, m, k, group, device):
    x = torch.randn(m, k, device=device)
    norm, residual = torch.randn(k, device=device), torch.randn(m, 40, device=device)
    got, expected = run(name, x, 40, group, device, norm_weight=norm, eps=1e-5, residual=residual)
    assert relative_error(got, expected) < TOLERANCE[name]


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("k,group", [(96, 32), (256, 32), (256, 64), (512, 128)])
@pytest.mark.parametrize("m", [1, 3])
def test_float16_scales(m, k, group, name, device):
    x, residual = torch.randn(m, k, device=device), torch.randn(m, 40, device=device)
    got, expected = run(name, x, 40, group, device, torch.float16, residual=residual)
    assert relative_error(got, expected) < TOLERANCE[name]


@pytest.mark.parametrize("m", [1, 3])
def test_float16_scales_of_all_magnitudes(m, device):
    """Each row of the weight has scales of one kind: negative, the largest, the smallest normal
    ones, subnormal ones, or zeros."""
    packed = torch.randint(0, 256, (8, 128), dtype=torch.uint8)
    column = [65504.0, -65504.0, 1.0, 2.0**-14, 2.0**-14 - 2.0**-24, 2.0**-24, -(2.0**-24), 0.0]
    scale = torch.tensor(column).half()[:, None].expand(8, 2).contiguous()
    x = torch.randn(m, 256, device=device)
    bundle = packed.to(device), scale.to(device)
    got = linear_w4a8(x, *prepack_linear(*bundle, 128), 128)
    expected = ops.linear_w4a8(x, *bundle, 128)
    for row in range(8):
        assert relative_error(got[:, row], expected[:, row]) < 1e-5
    assert expected[:, :7].abs().min() > 0


@pytest.mark.parametrize("n", [1, 2, 15, 33, 127, 129, 200])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("name", ["linear_w4a8", "linear_w8a8"])
def test_outputs(name, m, n, device):
    if torch.cuda.is_available() and name in INT8 and n == 1 and triton.__version__ < "3.7":
        pytest.skip("Triton 3.6 fails an assertion of its own; programs are made with 3.7")
    """The last block of outputs overlaps its neighbor, and a small N takes smaller blocks."""
    x, residual = torch.randn(m, 256, device=device), torch.randn(m, n, device=device)
    got, expected = run(name, x, n, 64, device, residual=residual)
    assert relative_error(got, expected) < TOLERANCE[name]


@pytest.mark.parametrize(
    "name,group", [(name, group) for name in INT4 for group in ops.GROUP_SIZES] + [(INT8[0], None)]
)
@pytest.mark.parametrize("span", [1, 2, 4])
def test_several_blocks_per_program(span, group, name, reconfigure, device):
    reconfigure("_gemv", BLOCK_ROWS=32, SPAN=span, REPEAT=4, num_warps=4)
    got, expected = run(name, torch.randn(1, 1024, device=device), 150, group, device)
    assert relative_error(got, expected) < TOLERANCE[name]


@pytest.mark.parametrize("k", [256, 8192])
@pytest.mark.parametrize("name", ["linear_w4a8", "linear_w8a8"])
def test_shortest_and_longest_row(name, k, device):
    x, norm = torch.randn(1, k, device=device).bfloat16(), torch.randn(k, device=device).bfloat16()
    got, expected = run(name, x, 24, 128, device, norm_weight=norm, eps=1e-5)
    assert relative_error(got, expected) < 4e-3


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("m,launches", [(1, 1), (2, 1), (9, 2), (40, 2)])
def test_bf16(name, m, launches, device):
    x = torch.randn(m, 512, device=device).bfloat16()
    norm, residual = torch.randn(512).to(x), torch.randn(m, 64).to(x)
    with record_launches(run=True) as recorded:
        got, expected = run(name, x, 64, 128, device, norm_weight=norm, residual=residual)
    assert len(recorded) == launches + (m == 2 and name.endswith("a16"))
    assert relative_error(got, expected) < 3e-3


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-20, 1e30])  # 1e-42 is denormal
def test_extreme_activations(name, m, scale, device):
    x = torch.randn(m, 256, device=device)
    x[0] *= scale
    x[-1, 128:] = 0.0
    got, expected = run(name, x, 32, 128, device)
    for row in range(m):
        # Tiles below 1e-30 count as zero.
        tiny = expected[row].abs().max() < 1e-30
        assert got[row].eq(0).all() if tiny else relative_error(got[row], expected[row]) < 1e-3


def test_w4a16_is_within_its_bound_of_an_outlier(device):
    """A tile has 15 bits: next to an outlier of 1000 the others are off by 1000 / 2^15 at most."""
    x = torch.randn(1, 256, device=device)
    x[0, 7] = 1000.0
    got, expected = run("linear_w4a16", x, 64, 128, device)
    assert relative_error(got, expected) < TOLERANCE["linear_w4a16"]


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_runs_repeat(name, m, device):
    packed = weights(name, 64, 256, 128, device)[1]
    x = torch.randn(m, 256, device=device)
    results = [TRITON_OPS[name](x, *packed) for _ in range(2)]
    assert torch.equal(*results)


def on_a_gpu(*values):
    """A parameter that takes too long under the interpreter."""
    reason = "takes too long without a GPU"
    return pytest.param(
        *values, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)
    )


def check_rows_alone(name, x, n, group, **options):
    """Rows get the bits that they get alone, in any place among others.

    Under the interpreter, which adds as numpy does, this is only a hint that it holds on a GPU."""
    if torch.cuda.is_available() and triton.__version__ != "3.7.1":
        # Triton 3.6 fuses other products of the two kernels with their sums.
        pytest.skip("bits are those of the Triton that programs are compiled with")
    packed = weights(name, n, x.shape[1], group, x.device)[1]
    residual = options.pop("residual", None)

    def run(rows):
        given = None if residual is None else residual[rows]
        return TRITON_OPS[name](x[rows], *packed, residual=given, **options)

    alone = torch.cat([run([row]) for row in range(len(x))])
    for count in range(2, len(x) + 1):
        for first in range(len(x)):
            rows = [(first + i) % len(x) for i in range(count)]
            assert torch.equal(run(rows), alone[rows]), rows


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(
    "n,k,group,span",
    [
        (48, 256, 32, 1),
        (37, 1024, 128, 1),
        (37, 1024, 64, 4),
        (50, 2048, 128, 2),
        on_a_gpu(12352, 2048, 128, 1),
        on_a_gpu(2048, 4096, 128, 4),
    ],
)
@pytest.mark.parametrize(
    "dtype,repeat", [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 1)]
)
def test_rows_do_not_depend_on_others(dtype, repeat, n, k, group, span, name, reconfigure, device):
    reconfigure("_gemv", SPAN=span, REPEAT=repeat)
    x = torch.randn(LINEAR_ROWS, k, device=device).to(dtype)
    x[1], x[2, :128] = x[1] * 1e4, 0.0
    norm, residual = torch.randn(k).to(x), torch.randn(LINEAR_ROWS, n).to(x)
    check_rows_alone(name, x, n, group, norm_weight=norm, eps=1e-5, residual=residual)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("block_m,block_n", [(16, 16), (32, 64)])
def test_rows_of_a_gemm_do_not_depend_on_others(block_m, block_n, name, reconfigure, device):
    """All configurations add up the blocks of a row in the same order, however many rows there
    are."""
    packed = weights(name, 50, 512, 128, device)[1]
    x, residual = torch.randn(70, 512, device=device), torch.randn(70, 50, device=device)
    expected = TRITON_OPS[name](x, *packed, residual=residual)
    reconfigure("linear_w", BLOCK_M=block_m, BLOCK_N=block_n)
    least = 17 if name.endswith("a8") else LINEAR_ROWS + 1  # fewer have another kernel
    for count in (least, 33, 70):
        rows = torch.randperm(70)[:count].tolist()
        got = TRITON_OPS[name](x[rows], *packed, residual=residual[rows])
        assert torch.equal(got, expected[rows])


@pytest.mark.parametrize("rows,warps", [(16, 1), (64, 2), (256, 4), (512, 8)])
@pytest.mark.parametrize("name", ["linear_w4a8", "linear_w8a8"])
def test_configurations_of_a_few_rows_give_the_same_bits(name, rows, warps, reconfigure, device):
    reconfigure("_gemv", REPEAT=8)
    reconfigure("_rows", BLOCK_ROWS=rows, num_warps=warps)
    check_rows_alone(name, torch.randn(2, 512, device=device), 150, 128)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(
    "rows,repeat,launched",
    [
        (2, 1, "_gemv_loop_kernel"),
        (2, 8, "_rows_kernel"),
        (5, 1, "_few_rows_kernel"),
        (17, 1, "_gemm_kernel"),
    ],
)
def test_kernel_of_a_few_rows(rows, repeat, launched, name, reconfigure, device):
    reconfigure("_gemv", REPEAT=repeat)
    with record_launches() as launches:
        run(name, torch.randn(rows, 256, device=device), 48, 128, device)
    if name.endswith("a16"):
        others = {"_gemv_loop_kernel": "_rows_kernel", "_few_rows_kernel": "_gemm_kernel"}
        launched = others.get(launched, launched)
    ahead = [] if launched == "_gemv_loop_kernel" else ["quantize_rows_kernel"]
    assert [x.name for x in launches] == [*ahead, launched]


@pytest.mark.parametrize("n,k", [(48, 96), (8, 256), (64, 8192)])
def test_shapes_that_the_kernel_of_a_few_rows_lacks(n, k, device):
    """There are not enough columns of out for all threads, or threads share the sum of one."""
    got, expected = run("linear_w4a8", torch.randn(2, k, device=device), n, 32, device)
    assert relative_error(got, expected) < TOLERANCE["linear_w4a8"]
    if k < 8192 or not torch.cuda.is_available():  # a GPU's own table may have smaller blocks
        assert not supports_rows(n, k, 2)


@pytest.mark.parametrize("dtype", ops.SCALE_DTYPES)
@pytest.mark.parametrize("k,group", SHAPES)
def test_prepack(k, group, dtype, device):
    """Unpacking the layout by its description gives back the weight and its scales."""
    packed, scale = ops.quantize_w4(torch.randn(24, k), group, scale_dtype=dtype)
    prepacked, pairs = prepack_linear(packed, scale, group)
    columns = 2 * prepacked.shape[1]
    half = next(h for h in (128, 64, 32) if columns % (2 * h) == 0)
    blocks = prepacked.unflatten(1, (-1, half))
    values = torch.stack((blocks & 0xF, blocks >> 4), dim=2).to(torch.int8).flatten(1)
    values = torch.where(values > 7, values - 16, values)
    assert torch.equal(values[:, :k], ops.unpack_int4(packed)) and not values[:, k:].any()
    step = min(half, group)
    pairs = pairs.contiguous().view(dtype).reshape(len(pairs), -1, 2)
    for index, pair in enumerate(pairs):
        block, within = divmod(index * step, half)
        for high in range(2):
            column = block * 2 * half + high * half + within
            expected = scale[:, column // group] if column < k else torch.zeros(24)
            assert torch.equal(pair[:, high].float(), expected.float())


@pytest.mark.parametrize(
    "op,change",
    [
        *((linear_w4a8, c) for c in ("group_size", "weight", "scale", "norm_weight", "residual")),
        *((linear_w8a8, c) for c in ("weight", "scale")),
    ],
)
def test_wrong_arguments(op, change, device):
    names = ["weight", "scale", "group_size"]
    values = weights(op.__name__, 64, 256, 128, device)[1]
    arguments = {
        "x": torch.randn(2, 256, device=device),
        **dict(zip(names, values, strict=False)),
        "norm_weight": torch.randn(256, device=device),
        "residual": torch.randn(2, 64, device=device),
    }
    value = arguments[change]
    arguments[change] = 16 if change == "group_size" else value.narrow(-1, 0, value.shape[-1] - 1)
    with pytest.raises(ValueError, match=change):
        op(**arguments)
