"""Runs one op's kernel in the C++ runtime and compares it with the op's eager reference."""

import json
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
from executorch.exir.passes import MemoryPlanningPass
from torch.export import Dim, export, exported_program

from et_moe.backends import ops
from et_moe.backends.ops.sequences import is_padding

TOKENS = (1, 2, 3, 15, 16, 17, 65)
DTYPES = (torch.float32, torch.bfloat16)
LINEAR_OPS = ("linear", "linear_w4a8", "linear_w4a16", "linear_w8a8", "linear_w8a16")
MOE_OPS = ("moe", "moe_w4a8", "moe_w4a16", "moe_w8a8", "moe_w8a16")
INVALID_ARGUMENT = 0x12

_SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.bool: 11,
    torch.bfloat16: 15,
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT4 weights and scales, some of them negative."""
    return ops.quantize_w4(weight, group_size, scale_dtype=scale_dtype)


def linear_weights(op: str, weight: torch.Tensor, group_size: int = 64) -> list:
    """The arguments of a linear op that stand for a float weight."""
    if op == "linear":
        return [weight]
    if op.startswith("linear_w8"):
        return [*ops.quantize_w8(weight)]
    return [*quantized(weight, group_size), group_size]


@dataclass(frozen=True)
class Result:
    """What one call gave: the runtime's error code (0 is success), the updated inputs and the
    outputs, and how many seconds it took."""

    error: int
    tensors: list[torch.Tensor]
    seconds: float


def _schema(op: str) -> Sequence:
    """The declared arguments of an op."""
    return getattr(torch.ops.et_moe, op).default._schema.arguments


def updated(op: str, args: Sequence) -> list[torch.Tensor]:
    """Those of an op's arguments that it updates in place."""
    return [
        a
        for a, declared in zip(args, _schema(op), strict=False)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]


def reference(op: str, args: Sequence) -> list[torch.Tensor]:
    """What a program must return: the inputs that are updated in place, then the results."""
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    results = getattr(ops, op)(*args)
    return updated(op, args) + (list(results) if isinstance(results, tuple) else [results])


def _padding(op: str, args: Sequence) -> torch.Tensor | None:
    """Which rows of an op's result are padding, which the contract leaves undefined and the kernels
    fill with zeros; None if no row is, or if the contract defines them."""
    names = [declared.name for declared in _schema(op)[: len(args)]]
    if op == "moe_router" or "num_tokens" not in names:
        return None
    num_tokens = args[names.index("num_tokens")]
    return None if num_tokens is None else is_padding(args[0].shape[0], num_tokens)


class _Call(torch.nn.Module):
    """The op with the tensors among its arguments as inputs, and the rest as constants."""

    def __init__(self, op: str, args: Sequence):
        super().__init__()
        self.op = getattr(torch.ops.et_moe, op)
        self.args = [None if isinstance(a, torch.Tensor) else a for a in args]
        self.slots = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]

    def forward(self, *tensors):
        args = list(self.args)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            args[slot] = tensor
        return self.op(*args)


def _tensors(args: Sequence) -> tuple[torch.Tensor, ...]:
    return tuple(a for a in args if isinstance(a, torch.Tensor))


def build_program(op: str, calls: Sequence[Sequence]) -> bytes:
    """A `.pte` of one op, in which sizes that differ between the calls are dynamic."""
    shapes = [[tuple(t.shape) for t in _tensors(args)] for args in calls]
    dims: dict[tuple[int, ...], Dim] = {}

    def dynamic(index: int) -> dict[int, Dim]:
        result = {}
        for d in range(len(shapes[0][index])):
            sizes = tuple(s[index][d] for s in shapes)
            if len(set(sizes)) > 1:
                dims.setdefault(sizes, Dim(f"d{len(dims)}", min=min(sizes), max=max(sizes)))
                result[d] = dims[sizes]
        return result

    specs = tuple(dynamic(i) for i in range(len(shapes[0])))
    largest = max(calls, key=lambda args: sum(t.numel() for t in _tensors(args)))
    program = export(_Call(op, largest), _tensors(largest), dynamic_shapes=(specs,))
    # There is nothing in it that could be decomposed, and to prepare for that takes torch longest.
    with mock.patch.object(
        exported_program, "_override_composite_implicit_decomp", lambda *_, **__: nullcontext()
    ):
        edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    planning = MemoryPlanningPass(alloc_graph_input=False)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer


class Harness:
    """Builds programs in a folder and runs them with the `op_runner` tool."""

    def __init__(self, tool: Path, folder: Path):
        self.tool, self.folder = tool, folder
        self.log = ""
        self._programs = 0

    def run(
        self, op: str, calls: Sequence[Sequence], threads: Sequence[int] = (0,)
    ) -> list[list[Result]]:
        """Makes all calls (lists of the op's arguments) once for each number of threads."""
        self._programs += 1
        stem = self.folder / f"{op}_{self._programs}"
        stem.with_suffix(".pte").write_bytes(build_program(op, calls))
        with stem.with_suffix(".in").open("wb") as file:
            for args in calls:
                for tensor in _tensors(args):
                    file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        descriptions = [
            [[_SCALAR_TYPES[t.dtype], *t.shape] for t in _tensors(args)] for args in calls
        ]
        return [self._execute(stem, descriptions, count) for count in threads]

    def _execute(self, stem: Path, shapes: list, threads: int) -> list[Result]:
        manifest = {
            "program": str(stem.with_suffix(".pte")),
            "data": str(stem.with_suffix(".in")),
            "output": str(stem.with_suffix(".out")),
            "threads": threads,
            "calls": shapes,
        }
        stem.with_suffix(".json").write_text(json.dumps(manifest))
        done = subprocess.run(
            [self.tool, stem.with_suffix(".json")], capture_output=True, text=True, timeout=600
        )
        self.log = done.stderr
        assert done.returncode == 0, f"op_runner: exit status {done.returncode}\n{done.stderr}"
        data, at = stem.with_suffix(".out").read_bytes(), 0
        results = []
        for report in json.loads(done.stdout):
            tensors = []
            for number, *shape in report["tensors"]:
                dtype = next(d for d, n in _SCALAR_TYPES.items() if n == number)
                size = torch.Size(shape).numel() * dtype.itemsize
                raw = bytearray(data[at : at + size])
                flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                tensors.append(flat.reshape(shape))
                at += size
            results.append(Result(report["error"], tensors, report["seconds"]))
        return results

    def compare(self, op: str, calls: Sequence[Sequence]) -> None:
        """Checks that every call agrees with the reference, that two threads change nothing, and
        that what the reference does not touch keeps its bits."""
        one, two = self.run(op, calls, threads=(1, 2))
        for i, args in enumerate(calls):
            assert one[i].error == 0, self.log
            expected, padding = reference(op, args), _padding(op, args)
            for n, (want, got, again) in enumerate(
                zip(expected, one[i].tensors, two[i].tensors, strict=True)
            ):
                where = f"{op}, call {i}, output {n}"
                assert torch.equal(got, again), f"{where}: differs between 1 and 2 threads"
                if n == len(expected) - 1 and padding is not None:
                    assert not got[padding].any(), f"{where}: padding is not zero"
                    want, got = want[~padding], got[~padding]
                assert_close(got, want, where, _rounds(op, args))
            for before, want, got in zip(updated(op, args), expected, one[i].tensors, strict=False):
                kept = (want == before).all(-1)
                assert torch.equal(got[kept], before[kept]), f"{op}, call {i}: touched too much"

    def refuse(self, op: str, args: Sequence, message: str) -> None:
        """Checks that the call ends in InvalidArgument and logs a line that contains `message`."""
        (result,) = self.run(op, [args])[0]
        assert result.error == INVALID_ARGUMENT
        assert message in self.log


def _rounds(op: str, args: Sequence) -> bool:
    """Whether the op rounds an intermediate result to INT8 or bfloat16."""
    quantizing = ("linear_w4a8", "linear_w8a8", "moe_w4a8", "moe_w8a8", "silu_quantize_int8")
    return op in quantizing or any(
        t.dtype == torch.bfloat16 for t in (*_tensors(args)[:1], *updated(op, args))
    )


def assert_close(got: torch.Tensor, want: torch.Tensor, where: str, rounds: bool) -> None:
    """Checks that integers are equal and that floats differ by little.

    Floats may be off by 1e-5 of the largest number of their row; bfloat16 numbers by a unit in
    their last place besides.

    Args:
        rounds: whether the op rounds an intermediate result. Where two results differ in the last
            bit before the rounding, they may differ by a whole step after it, and all that is made
            of such a row. Hence 3% of the numbers, or one row of 16 or more, may be further off:
            INT8 numbers by 1, floats by 1% of their row's largest.
    """
    assert got.dtype == want.dtype and got.shape == want.shape, where
    error, magnitude = (got.double() - want.double()).abs(), want.double().abs()
    if want.is_floating_point():
        own = magnitude * (2**-7 if want.dtype == torch.bfloat16 else 1e-5)
        largest = magnitude.amax(-1, keepdim=True) if want.numel() else magnitude
        tight, loose = own + 1e-5 * largest, own + 1e-2 * largest
    else:
        tight = torch.zeros_like(error)
        loose = tight + (1 if want.dtype == torch.int8 else 0)
    off = int((~(error <= tight)).sum())
    row = want.shape[-1] if want.dim() == 2 and len(want) >= 16 else 0
    allowed = max(0.03 * want.numel(), row) if rounds else 0
    assert off <= allowed and bool((error <= loose).all()), (
        f"{where}: {off} of {want.numel()} numbers are off, by up to {float(error.max()):.3g} "
        f"where {float(tight.flatten()[error.argmax()]):.3g} is allowed"
    )
