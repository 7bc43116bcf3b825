"""Compiles a method's graph to CUDA code, range by range, on any x86-64 Linux machine."""

import copy
import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from et_moe.backends.cuda.build import build, scratch_folder, toolchain
from et_moe.backends.cuda.fusion import fuse
from et_moe.backends.cuda.gpu import TWINS, Gpu, gpu_for, pretend_gpu
from et_moe.backends.cuda.host_program import kernel_calls
from et_moe.backends.cuda.inductor import HostProgram, Kernel, generate
from et_moe.backends.cuda.prepack import WeightPlan
from et_moe.backends.cuda.ranges import Range, split
from et_moe.backends.cuda.triton.hand_over.op import hand_over, hand_over_drafts
from et_moe.backends.cuda.triton.table import TRITON_OPS
from et_moe.backends.cuda.triton.tuning import tuning_target
from et_moe.backends.method_graph import HandOver, MethodGraph

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class CompiledRange:
    """A method's host program for one range of the size that varies from call to call.

    Attributes:
        longest: the largest size that it is for; 1 if none varies.
        code: the shared object.
        source: its C++ text.
        kernels: what it launches.
    """

    longest: int
    code: bytes
    source: str
    kernels: list[Kernel]

    @property
    def launches(self) -> int:
        """Kernel launches per call."""
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.code).hexdigest()


@dataclasses.dataclass(frozen=True)
class CompiledMethod:
    """A method's code for one architecture.

    Attributes:
        ranges: the host programs, by rising size.
        binaries: of all their kernels, by SHA-256; ranges may share one.
    """

    arch: str
    ranges: list[CompiledRange]
    binaries: dict[str, bytes]


def _index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    # Its decomposition indexes a CUDA tensor in Python, which a CPU build of torch cannot.
    return aten.index.Tensor(x, [None] * dim + [index])


def _size_in(limits: Range, shape_env: ShapeEnv) -> int | torch.SymInt:
    """A size that may be any of a range: a symbol, or a number if there is only one."""
    if limits.low == limits.high:
        return limits.low
    limit = ValueRanges(limits.low, limits.high)
    constraint = StrictMinMaxConstraint(vr=limit, warn_only=False)
    source = ConstantSource("length")
    symbol = shape_env.create_symbol(limits.high, source, DimDynamic.DYNAMIC, constraint)
    return shape_env.create_symintnode(symbol, hint=limits.high, source=source)


def _check_any_size(limits: Range, shape_env: ShapeEnv) -> None:
    """Raises RuntimeError if code was made on conditions that not all sizes of a range meet."""
    failed = [f"{symbol} is {value}" for symbol, value in shape_env.replacements.items()]
    for condition in (guard.expr for guard in shape_env.guards):
        sizes = range(limits.low, limits.high + 1)
        if not all(condition.subs(dict.fromkeys(condition.free_symbols, n)) for n in sizes):
            failed.append(str(condition))
    if failed:
        raise RuntimeError(f"the code is not for all of {limits}: {', '.join(failed)}")


def _retarget(
    graph: MethodGraph, plan: WeightPlan, limits: Range, fake_mode: FakeTensorMode
) -> tuple[GraphModule, list[torch.Tensor]]:
    """The graph on `cuda:0`, ops replaced by the functions that launch their kernels.

    Args:
        limits: of the size that varies from call to call.
        fake_mode: of the inputs, fresh: what is known of a size in one range is not for others.
    """
    device = torch.device("cuda", 0)
    size = _size_in(limits, fake_mode.shape_env)
    module = GraphModule(torch.nn.Module(), copy.deepcopy(graph.program.graph))
    fuse(module.graph)
    names = iter(graph.input_nodes())
    inputs, nodes = [], {}
    for node in list(module.graph.nodes):
        if node.op == "placeholder":
            if (value := node.meta["val"]) is None:
                module.graph.erase_node(node)
                continue
            nodes[name := next(names)] = node
            dtype, shape = plan.spec.get(name, (value.dtype, value.shape))
            # The code never sees how large a pool is: kernels follow numbers of pages and slots.
            free = graph.bounds(shape[0])[1] if name in graph.state else size
            with fake_mode:
                sizes = [s if isinstance(s, int) else free for s in shape]
                node.meta["val"] = torch.empty(sizes, dtype=dtype, device=device)
            inputs.append(node.meta["val"])
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # would assert that the device is the CPU
            continue
        if node.target is aten.index_select.default:
            node.target = _index_select
        elif getattr(node.target, "namespace", None) == "et_moe":
            if (op := node.target._opname) not in TRITON_OPS:
                raise NotImplementedError(f"op et_moe::{op} has no Triton kernel")
            node.target = TRITON_OPS[op]
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    if graph.hand_over is not None:
        results = dict(zip(graph.outputs, module.graph.output_node().args[0], strict=True))
        inputs += _end_with_hand_over(module.graph, nodes, results, graph.hand_over)
    module.recompile()
    return module, inputs


def _end_with_hand_over(
    graph: Graph, inputs: Mapping[str, Node], results: Mapping[str, Node], names: HandOver
) -> list[torch.Tensor]:
    """Adds the call of `hand_over`, or of `hand_over_drafts`, to a graph with these inputs and
    results.

    Returns:
        The values of `drawn`, and `calls`, which the graph has now as inputs behind all others.
    """
    last, given = list(inputs.values())[-1], inputs[names.tokens].meta["val"]
    sequences, width = given.shape[0], results[names.token].meta["val"].shape[1:]
    shapes = {"drawn": (2, sequences)}
    if names.versions is not None:
        shapes = {"drawn": (2, sequences, *width), "calls": (sequences,)}
    added = {}
    for name, shape in shapes.items():
        with graph.inserting_after(last):
            last = added[name] = graph.placeholder(name)
        with given.fake_mode:
            value = torch.empty(shape, dtype=torch.int64, device=given.device)
        last.meta["val"] = value
    arguments = [results[names.token], inputs[names.positions], added["drawn"]]
    arguments.append(inputs[names.tokens])
    if names.versions is not None:
        arguments += [inputs[names.versions], added["calls"]]
    with graph.inserting_before(graph.output_node()):
        function = hand_over if names.versions is None else hand_over_drafts
        graph.call_function(function, tuple(arguments))
    return [node.meta["val"] for node in added.values()]


def check_in_place(source: str, graph: MethodGraph) -> None:
    """Raises RuntimeError unless every tensor that is updated is passed to ops' kernels: state to
    them only, and `drawn` and the inputs that `hand_over` names to the kernel that does it.

    A copy of such a tensor, before or after it is updated, would be a kernel of Inductor's.
    """
    passed = {name: f"arg{i}_1" for i, name in enumerate(graph.input_nodes())}
    calls = [
        (kernel, {word for a in arguments for word in re.findall(r"\w+", a)})
        for kernel, arguments in kernel_calls(source)
    ]
    for kernel, words in calls:
        for name in graph.state:
            if kernel.startswith("triton_") and passed[name] in words:
                raise RuntimeError(f"state {name} is copied by generated kernel {kernel}")
    used = set().union(*(words for _, words in calls))
    if unused := sorted(name for name in graph.state if passed[name] not in used):
        raise RuntimeError(f"state {unused} is used by no kernel")
    if graph.hand_over is None:
        return
    handed = [words for kernel, words in calls if kernel.startswith("_hand_over_")]
    _, *names = graph.hand_over.describe().values()
    added = 1 if graph.hand_over.versions is None else 2  # `drawn`, `calls`: behind all others
    wanted = {passed[name] for name in names}
    wanted |= {f"arg{len(passed) + i}_1" for i in range(added)}
    if len(handed) != 1 or not wanted <= handed[0]:
        raise RuntimeError("the token is not handed over in place")


def _generate(
    graph: MethodGraph, plan: WeightPlan, gpu: Gpu, limits: Range, kernels: Path
) -> HostProgram:
    with (
        tempfile.TemporaryDirectory() as work,
        pretend_gpu(gpu),
        tuning_target(gpu.name, gpu.arch, TWINS.get(gpu.arch, gpu.arch)),
    ):
        fake_mode = FakeTensorMode(shape_env=ShapeEnv())
        module, inputs = _retarget(graph, plan, limits, fake_mode)
        program = generate(module, inputs, Path(work), kernels)
        _check_any_size(limits, fake_mode.shape_env)
        return program


def compile_method(graph: MethodGraph, plan: WeightPlan, arch: str) -> CompiledMethod:
    """Compiles one method for one architecture; no GPU, driver or CUDA toolkit is needed.

    The code of each range takes the method's inputs, state and weights (prepacked, see `plan`), and
    behind them, if the method has a `hand_over`, `drawn` of `triton.hand_over`, and of one that is
    fed drafts `calls`: CUDA tensors in that order, contiguous and aligned to 16 bytes. It updates
    in place state and what `hand_over` writes.

    Args:
        arch: one of `gpu.ARCHS`; kernels are tuned for the first GPU of that architecture there.

    Raises:
        UnsupportedOpError: the graph has an op without a kernel, which would be a library call.
        ToolchainError: unsupported versions, or a missing compiler.
        RuntimeError: state that is copied.
        ValueError: more than one size varies from call to call.
    """
    gpu = gpu_for(arch)
    toolchain()  # before minutes of work
    ranges, binaries = [], {}
    with scratch_folder() as scratch:
        for limits in split(*graph.length()):
            program = _generate(graph, plan, gpu, limits, scratch / "kernels")
            check_in_place(program.source, graph)
            code = build(program.source)
            ranges.append(CompiledRange(limits.high, code, program.source, program.kernels))
            binaries |= program.binaries
    return CompiledMethod(arch, ranges, binaries)
