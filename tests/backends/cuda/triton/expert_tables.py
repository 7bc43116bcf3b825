"""Tables of experts for the tests: as a bundle has them, and as the kernels take them."""

import torch

from et_moe.backends import ops
from et_moe.backends.cuda.triton.moe.layout import (
    prepack_experts,
    prepack_experts_dense,
    prepack_experts_w8,
)
from et_moe.backends.cuda.triton.table import TRITON_OPS

# The relative L2 error that is allowed against the reference. On a GPU, silu and sums differ from
# it in the last bits, and rounding to INT8 turns a few of those differences into whole steps.
TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-5


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def gaussian(count, rows, columns):
    return torch.randn(count, rows, columns) * columns**-0.5


def gaussian_w4(count, rows, columns, group):
    return ops.quantize_w4(gaussian(count, rows, columns), group, "minmax")


def random_w4(count, rows, columns, group):
    packed = torch.randint(0, 256, (count, rows, columns // 2), dtype=torch.uint8)
    scale = 0.2 * columns**-0.5 * (0.5 + torch.rand(count, rows, columns // group))
    return packed, scale.bfloat16()


class Tables:
    """The weights of experts, both as a bundle has them and as the kernels take them.

    Attributes:
        sizes: what an op takes behind the ids: the group size, if it has one.
    """

    def __init__(self, count, hidden, device, bundle, prepack, sizes=()):
        self.count, self.hidden, self.device, self.sizes = count, hidden, device, sizes
        self.bundle = [tensor.to(device) for tensor in bundle]
        self.prepacked = prepack(*self.bundle, *sizes)

    def launch(self, name, x, weights, ids, residual=None):
        """The result of the kernels."""
        return TRITON_OPS[name](x, *self.prepacked, weights, ids, *self.sizes, residual)

    def run(self, name, x, weights, ids, residual=None):
        """The result of the kernels, and that of the reference."""
        got = self.launch(name, x, weights, ids, residual)
        assert got.dtype == x.dtype and got.shape == x.shape
        return got, getattr(ops, name)(x, *self.bundle, weights, ids, *self.sizes, residual)

    def inputs(self, tokens, top_k):
        x = torch.randn(tokens, self.hidden, device=self.device)
        ids = torch.rand(tokens, self.count).argsort(-1)[:, :top_k].int().to(self.device)
        return x, torch.rand(tokens, top_k, device=self.device).softmax(-1), ids


class Experts(Tables):
    """INT4."""

    def __init__(self, count, hidden, inner, group, device, scale_dtype=torch.bfloat16):
        # Quantizing takes long, so the nibbles of many experts are drawn at random instead.
        draw = random_w4 if count > 64 else gaussian_w4
        w13, w2 = draw(count, 2 * inner, hidden, group), draw(count, hidden, inner, group)
        bundle = [*w13, *w2]
        for i in (1, 3):
            # The factor turns a bfloat16 number into one that bfloat16 cannot represent.
            factor = 1.0 if scale_dtype == torch.bfloat16 else 1.01
            bundle[i] = (bundle[i].float() * factor).to(scale_dtype)
        super().__init__(count, hidden, device, bundle, prepack_experts, (group,))
        self.group = group


def int8_or_dense(name, count, hidden, inner, dtype, device) -> Tables:
    """Tables for the op `name`: INT8, or of the dtype."""
    w13, w2 = gaussian(count, 2 * inner, hidden), gaussian(count, hidden, inner)
    if name == "moe":
        bundle = w13.to(dtype), w2.to(dtype)
        return Tables(count, hidden, device, bundle, prepack_experts_dense)
    bundle = *ops.quantize_w8(w13), *ops.quantize_w8(w2)
    return Tables(count, hidden, device, bundle, prepack_experts_w8)
