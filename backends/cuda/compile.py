"""Compiles a method's graph to a CUDA shared object, on any x86-64 Linux machine."""

import copy
import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

from et_moe.backends.cuda.build import build, scratch_folder, toolchain
from et_moe.backends.cuda.fusion import fuse
from et_moe.backends.cuda.gpu import TWINS, Gpu, gpu_for, pretend_gpu
from et_moe.backends.cuda.host_program import kernel_calls
from et_moe.backends.cuda.inductor import HostProgram, Kernel, generate
from et_moe.backends.cuda.prepack import WeightPlan
from et_moe.backends.cuda.triton.hand_over.op import _hand_over_kernel, hand_over
from et_moe.backends.cuda.triton.table import TRITON_OPS
from et_moe.backends.cuda.triton.tuning import tuning_target
from et_moe.backends.method_graph import HandOver, MethodGraph

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class CompiledMethod:
    """A method's code for one architecture.

    Attributes:
        code: the shared object.
        source: C++ text of its host program.
        kernels: what it launches.
    """

    arch: str
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


def _index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    # Its decomposition indexes a CUDA tensor in Python, which a CPU build of torch cannot.
    return aten.index.Tensor(x, [None] * dim + [index])


def _retarget(graph: MethodGraph, plan: WeightPlan) -> tuple[GraphModule, list[torch.Tensor]]:
    """The graph on `cuda:0`, ops replaced by the functions that launch their kernels."""
    device = torch.device("cuda", 0)
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
            with value.fake_mode:
                node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
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
        inputs.append(_end_with_hand_over(module.graph, nodes, results, graph.hand_over))
    module.recompile()
    return module, inputs


def _end_with_hand_over(
    graph: Graph, inputs: Mapping[str, Node], results: Mapping[str, Node], names: HandOver
) -> torch.Tensor:
    """Adds the call of `hand_over` to a graph with these inputs and results.

    Returns:
        The value of the input `drawn`, which the graph has now behind all others.
    """
    tokens, last = inputs[names.tokens], list(inputs.values())[-1]
    with graph.inserting_after(last):
        drawn = graph.placeholder("drawn")
    with tokens.meta["val"].fake_mode:
        value = torch.empty(2, dtype=torch.int64, device=tokens.meta["val"].device)
    drawn.meta["val"] = value
    with graph.inserting_before(graph.output_node()):
        graph.call_function(
            hand_over, (results[names.token], inputs[names.position], drawn, tokens)
        )
    return value


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
    handed = [words for kernel, words in calls if kernel.startswith(_hand_over_kernel.__name__)]
    wanted = {passed[graph.hand_over.position], passed[graph.hand_over.tokens]}
    wanted.add(f"arg{len(passed)}_1")  # `drawn`, behind all others
    if len(handed) != 1 or not wanted <= handed[0]:
        raise RuntimeError("the token is not handed over in place")


def _generate(graph: MethodGraph, plan: WeightPlan, gpu: Gpu) -> HostProgram:
    with (
        tempfile.TemporaryDirectory() as work,
        pretend_gpu(gpu),
        tuning_target(gpu.name, gpu.arch, TWINS.get(gpu.arch, gpu.arch)),
    ):
        module, inputs = _retarget(graph, plan)
        return generate(module, inputs, Path(work))


def compile_method(graph: MethodGraph, plan: WeightPlan, arch: str) -> CompiledMethod:
    """Compiles one method for one architecture; no GPU, driver or CUDA toolkit is needed.

    The code takes the method's inputs, state and weights (prepacked, see `plan`), and behind them,
    if the method has a `hand_over`, `drawn` of `triton.hand_over`: CUDA tensors in that order,
    contiguous and aligned to 16 bytes. It updates in place state and what `hand_over` writes.

    Args:
        arch: one of `gpu.ARCHS`; kernels are tuned for the first GPU of that architecture there.

    Raises:
        UnsupportedOpError: the graph has an op without a kernel, which would be a library call.
        ToolchainError: unsupported versions, or a missing compiler.
        RuntimeError: state that is copied.
    """
    gpu = gpu_for(arch)
    toolchain()  # before minutes of work
    with scratch_folder():
        program = _generate(graph, plan, gpu)
        check_in_place(program.source, graph)
        return CompiledMethod(arch, build(program), program.source, program.kernels)
