"""Runs TorchInductor up to its C++ host program and its compiled kernels, and takes both over."""

import ast
import collections
import contextlib
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import sympy
import torch
import triton
import triton.language as tl
from torch.fx import GraphModule
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from et_moe.backends.cuda import ptx
from et_moe.backends.cuda.gpu import ptxas_environment
from et_moe.backends.cuda.host_program import (
    Accesses,
    find_dependents,
    find_kernels,
    kernel_calls,
    launch_dependents,
)

OPTIONS = {
    "aot_inductor.embed_kernel_binary": True,
    "aot_inductor.emit_multi_arch_kernel": False,
    "aot_inductor.link_libtorch": False,
    "aot_inductor.package": False,
    # In this process: worker processes would not see the pretended GPU.
    "compile_threads": 1,
    # Kernels are compiled while the host program is generated, not by a first run of it.
    "triton.autotune_at_compile_time": True,
    "use_static_triton_launcher": False,
    # A Python float is an fp32 parameter, as it is where Triton itself launches the kernel; fp64
    # would spread from there through the kernel's arithmetic.
    "_use_fp64_for_unbacked_floats": False,
    # The program that loads the code checks what it passes, once.
    "size_asserts": False,
    # Matmul patterns and constant folding: they would run ops on the GPU, and ours has no use for
    # them.
    "use_joint_graph_passes": False,
    "use_pre_grad_passes": False,
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled Triton kernel: an op's or one that Inductor generated.

    Attributes:
        name: unique in its method.
        function: name of the entry point in the binary, not unique: specialisations share it.
        module: Python module of an op's kernel; empty for Inductor's own.
        source: Python text that defines `function` as a Triton kernel.
        parameters: (name, type) of what a launch passes, in order; Triton's type names ("*bf16",
            "i32"). A launch passes two more pointers behind them, to scratch memory.
        constants: values of all other parameters; a Triton dtype is {"dtype": name}.
        num_warps: of a block. shared_memory: bytes of a block.
        sha256: of the binary (a cubin).
        grid: expressions of the sizes of distinct launches, in the host program's terms.
        launches: per call of the method.
        dependent: whether it may start before the kernel before it ends.
    """

    name: str
    function: str
    module: str
    source: str
    parameters: list[list[str]]
    constants: dict[str, object]
    num_warps: int
    shared_memory: int
    sha256: str
    grid: list[list[str]]
    launches: int
    dependent: bool


@dataclasses.dataclass(frozen=True)
class HostProgram:
    """C++ text of the host program, its kernels, and their binaries by SHA-256."""

    source: str
    kernels: list[Kernel]
    binaries: dict[str, bytes]


class UnsupportedOpError(RuntimeError):
    """The graph has an op that would be a library call at run time."""


def _kernel_source(module_source: str, function: str) -> str:
    """A generated kernel module without what ties it to Inductor's launcher."""
    tree = ast.parse(module_source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) == "triton.jit"]
    tree.body = [n for n in tree.body if ast.unparse(n) != "triton_helpers.set_driver_to_gpu()"]
    return ast.unparse(tree) + "\n"


def _origin(function: str, source: str) -> str:
    """The module that defines an op's kernel, or nothing for a kernel that Inductor made."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    for kernel in kernel_side_table.id_to_kernel.values():
        if kernel.fn.__name__ == function and kernel.src == source:
            _check_names(kernel, {})
            return kernel.fn.__module__
    return ""


def _check_names(function: JITFunction, seen: dict[str, object]) -> None:
    """Raises RuntimeError where two files behind a kernel use one global name for two things.

    Inductor copies a kernel and all that it calls into one module, where the first would win.
    """
    for name in function.fn.__code__.co_names:
        symbol = function.fn.__globals__.get(name)
        if not isinstance(symbol, (JITFunction, tl.constexpr, int, str)):
            continue
        value = symbol.value if isinstance(symbol, tl.constexpr) else symbol
        if name not in seen:
            seen[name] = value
            if isinstance(symbol, JITFunction):
                _check_names(symbol, seen)
        elif seen[name] != value:
            raise RuntimeError(
                f"kernel {function.fn.__module__}.{function.fn.__name__}: the name {name} has "
                "another meaning in a function it calls or is called by: rename one"
            )


def _plain(value: object) -> object:
    """A constexpr as JSON knows it."""
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if isinstance(value, tl.constexpr):
        return _plain(value.value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"constexpr {value!r} of type {type(value).__name__} cannot be written down")


_NO_CHECKS = """
static bool _check_aoti_runtime_check_inputs_env() { return false; }
static void __check_inputs_outputs(AtenTensorHandle*, AtenTensorHandle*) {}
"""
"""In place of functions that compare every input with its type: most of a host program's text."""


_DRIVER_CHECK = """#define CUDA_DRIVER_CHECK(EXPR) et_moe_check_driver(EXPR, #EXPR);
static void et_moe_check_driver(CUresult error, const char* call) {
  if (error == CUDA_SUCCESS) return;
  const char* name = nullptr;
  if (cuGetErrorName(error, &name) != CUDA_SUCCESS) name = "unknown error";
  throw std::runtime_error(std::string(call).substr(0, std::strcspn(call, "(")) + ": " + name);
}
"""
"""In place of a check that says neither the call nor the error's name."""


class _Strict(logging.Handler):
    """Turns a warning of torch's analysis of a kernel into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.module == "triton_kernel_wrap" and record.levelno >= logging.WARNING:
            cause = record.exc_info[1] if record.exc_info else None
            raise RuntimeError(f"{record.getMessage()}: {cause}") from cause


@contextlib.contextmanager
def _strict_kernel_analysis() -> Iterator[None]:
    """Where it fails torch would assume that a kernel writes all of its arguments, weights too."""
    log, handler = logging.getLogger("torch._dynamo"), _Strict()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


_ANALYSES: dict[str, dict[tuple, tuple]] = collections.defaultdict(dict)
"""Target of Triton -> what `_once_per_variant` has found for it, in whatever graph."""


def _once_per_variant(analyse: Callable, known: dict[tuple, tuple]) -> Callable:
    """torch's analysis of what a kernel reads and writes, kept for launches that differ in nothing
    that the kernel's code depends on: most of the time of a compilation with hundreds of launches.

    Args:
        known: what has been found for the same target, to which this adds.
    """

    def variant(value: object) -> object:
        if hasattr(value, "get_dtype"):  # Inductor's tensors
            return value.get_dtype()
        if isinstance(value, torch.Tensor):
            return value.dtype
        if value is None or isinstance(value, (bool, int, float, str)):
            return (type(value), value)
        return "symbol" if isinstance(value, (torch.SymInt, sympy.Expr)) else str(value)

    def cached(kernel, kwargs: dict, tma_descriptor_metadata: dict):
        function, given = kernel, kwargs
        if isinstance(kernel, Autotuner):
            # torch makes one for each launch that has options, with these as its configuration.
            function, given = kernel.fn, kwargs | kernel.configs[0].kwargs
        arguments = tuple((name, variant(value)) for name, value in sorted(given.items()))
        key = (id(function), arguments, str(tma_descriptor_metadata))
        if key not in known:
            # With the function, whose id no other has then.
            known[key] = function, analyse(kernel, kwargs, tma_descriptor_metadata)
        return known[key][1]

    return cached


class _Collector:
    """Takes the places of the autotuner and of the C++ compiler in Inductor's pipeline."""

    def __init__(self) -> None:
        self.autotuners: dict[str, object] = {}
        self.program: HostProgram | None = None

    def compile_kernels(self, wrapper) -> None:
        """In place of timing every candidate on the GPU: keep the first."""
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        scope: dict[str, object] = {}
        wait = "\nasync_compile.wait(globals())\n"
        exec(wrapper.kernel_autotune_defs.getvalue() + wait, scope)
        for value in scope.values():
            if isinstance(value, CachingAutotuner):
                value.save_gpu_kernel(0, value.launchers[0])
                self.autotuners[value.inductor_meta["kernel_name"]] = value

    def take_program(self, graph, wrapper_code, kernel_code, extern_nodes, **_) -> str:
        """In place of calling the C++ compiler."""
        from torch._inductor.codecache import CudaKernelParamCache

        if extern_nodes:
            raise UnsupportedOpError(f"ops without a kernel are left in the graph: {extern_nodes}")
        calls: dict[str, list[list[str]]] = {}
        for name, arguments in kernel_calls(wrapper_code):
            calls.setdefault(name, []).append(arguments)
        accesses = {name: self._accesses(name, CudaKernelParamCache.cache[name]) for name in calls}
        dependents = find_dependents(wrapper_code, accesses)
        binaries, kernels = {}, []
        for name, launches in calls.items():
            parameters = CudaKernelParamCache.cache[name]
            binary = Path(parameters["cubin_path"]).read_bytes()
            kernel = self._kernel(name, parameters, binary, launches, name in dependents)
            kernels.append(kernel)
            binaries[kernel.sha256] = binary
        source, count = re.subn(
            r"#define CUDA_DRIVER_CHECK\(EXPR\)(.*\\\n)+.*\n", lambda _: _DRIVER_CHECK, wrapper_code
        )
        if count != 1:
            raise RuntimeError("torch generates another host program than expected")
        source = launch_dependents(source, dependents)
        source = find_kernels(source, {kernel.name: kernel.sha256 for kernel in kernels})
        self.program = HostProgram(source, kernels, binaries)
        return ""

    def _accesses(self, name: str, parameters: dict) -> Accesses:
        text, passed = self.autotuners[name].launchers[0].bin.asm["ptx"], parameters["call_args"]
        early, written = ptx.read_early(text, passed), ptx.written(text, passed)
        starts_next = ptx.starts_next_early(text)
        return Accesses(parameters["def_args"], early, written, starts_next)

    def _kernel(
        self,
        name: str,
        parameters: dict,
        binary: bytes,
        launches: list[list[str]],
        dependent: bool,
    ) -> Kernel:
        jit = self.autotuners[name].fn
        signature = parameters["triton_meta"]["signature"]
        constants = {**parameters["config"], **parameters["triton_meta"]["constants"]}
        function = parameters["mangled_name"]
        # An op's kernel gets its grid as arguments before the last four (device, stream, kernels,
        # folder); one of Inductor's computes it from its sizes.
        grids = [call[-7:-4] for call in launches] if "_grid_0" in parameters["def_args"] else []
        return Kernel(
            name=name,
            function=function,
            module=_origin(function, jit.src),
            source=_kernel_source(Path(jit.fn.__code__.co_filename).read_text(), function),
            parameters=[[p, signature[p]] for p in parameters["call_args"]],
            constants={k: _plain(v) for k, v in constants.items() if k in jit.arg_names},
            num_warps=parameters["num_warps"],
            shared_memory=parameters["shared_mem"],
            sha256=hashlib.sha256(binary).hexdigest(),
            grid=[list(g) for g in dict.fromkeys(map(tuple, grids))],
            launches=len(launches),
            dependent=dependent,
        )


def generate(
    module: GraphModule, inputs: list[torch.Tensor], work: Path, kernels: Path
) -> HostProgram:
    """Compiles a graph of Triton functions and aten ops to a host program and kernels.

    To be called inside `pretend_gpu`.

    Args:
        module: the graph; placeholders are `inputs`.
        inputs: fake CUDA tensors.
        work: an empty folder for intermediate files.
        kernels: a folder of compiled kernels; those that are in it are not compiled again.

    Raises:
        UnsupportedOpError: the graph has an op that would be a library call.
    """
    from torch._dynamo.repro import after_aot
    from torch._higher_order_ops import triton_kernel_wrap
    from torch._inductor import codecache, compile_fx
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    collector, op_class = _Collector(), triton_kernel_wrap.Op
    analyses = _ANALYSES[str(triton.runtime.driver.active.get_current_target())]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(work), "TRITON_CACHE_DIR": str(kernels)}
    environment |= ptxas_environment()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_strict_kernel_analysis())
        stack.enter_context(triton.knobs.compilation.scope())
        # Source positions would put the names of temporary files into the binaries.
        triton.knobs.compilation.disable_line_info = True
        for target, name, value in (
            (
                PythonWrapperCodegen,
                "generate_and_run_autotune_block",
                lambda wrapper: collector.compile_kernels(wrapper),
            ),
            (codecache.AotCodeCompiler, "compile", collector.take_program),
            (
                CppWrapperCpu,
                "generate_input_output_runtime_checks",
                lambda wrapper: wrapper.prefix.splice_aot(_NO_CHECKS),
            ),
            (
                triton_kernel_wrap,
                "identify_accessed_tensors",
                _once_per_variant(triton_kernel_wrap.identify_accessed_tensors, analyses),
            ),
            # A tenth of the time, for a text that goes to a log which is off.
            (after_aot, "save_graph_repro", lambda *args, **kwargs: None),
            # Inline assembly of kernels computes or prefetches; it never stores.
            (
                triton_kernel_wrap,
                "Op",
                lambda *args, is_pure=True, **kwargs: op_class(*args, is_pure=True, **kwargs),
            ),
            # The runtime guarantees alignment. Copying an input that lacks it would silently break
            # the update of state in place.
            (compile_fx, "get_input_idxs_to_check", lambda inputs, static_input_idxs: []),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        compile_fx.compile_fx_aot(module, inputs, config_patches=OPTIONS)
    assert collector.program is not None
    return collector.program
