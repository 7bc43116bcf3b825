"""How often torch is asked about a kernel: once for all launches that differ in nothing that it
looks at."""

import sympy
import torch
import triton
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.runtime.autotuner import Autotuner

from et_moe.backends.cuda.inductor import _once_per_variant


def tuner(function, **sizes: int) -> Autotuner:
    """What torch makes of a launch with options, which is a new object each time."""
    made = object.__new__(Autotuner)
    made.fn, made.configs = function, [triton.Config(sizes, num_warps=2)]
    return made


def test_a_kernel_is_analysed_once_per_variant() -> None:
    analysed = []

    def analyse(kernel, arguments, descriptors):
        analysed.append((kernel, arguments))
        return len(analysed)

    def one(x, N): ...

    def two(x, N): ...

    known = {}
    ask, x = _once_per_variant(analyse, known), torch.zeros(3)
    assert ask(one, {"x": x, "N": 2}, {}) == 1
    assert ask(one, {"N": 2, "x": torch.ones(5)}, {}) == 1
    assert ask(tuner(one), {"x": x, "N": 2}, {}) == 1
    assert ask(tuner(one, N=2), {"x": x}, {}) == 1
    others = [
        (two, {"x": x, "N": 2}),
        (tuner(one, N=4), {"x": x}),
        (one, {"x": x, "N": 2.0}),
        (one, {"x": x.long(), "N": 2}),
        (one, {"x": None, "N": 2}),
        (one, {"x": x, "N": sympy.Symbol("s")}),
    ]
    assert [ask(*other, {}) for other in others] == [2, 3, 4, 5, 6, 7]
    size = ShapeEnv().create_unbacked_symint()
    assert ask(tuner(one), {"x": x, "N": size}, {}) == 7
    assert _once_per_variant(analyse, known)(one, {"x": x, "N": 2}, {}) == 1
    assert _once_per_variant(analyse, {})(one, {"x": x, "N": 2}, {}) == 8
