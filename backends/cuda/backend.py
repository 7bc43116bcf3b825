"""Lowers methods to a `.pte` whose code runs on CUDA, through ExecuTorch's delegate interface.

A whole method is one opaque op in the program that ExecuTorch sees, so that ops which update state
in place never pass the edge dialect, which would make copies of them. The op is delegated, and
`preprocess` compiles the real graph.

The delegate's processed bytes are JSON (see `describe`). Code lies in named blobs of the `.pte`:
a host program for each architecture and range, `<method>.<architecture>.<longest>`, and the binary
of each kernel once, whoever launches it, under its SHA-256.
"""

import contextlib
import contextvars
import dataclasses
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import final

import torch
import triton
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.passes import MemoryPlanningPass
from torch.export import Dim, ExportedProgram

from et_moe.backends.bindings import (
    describe_method,
    describe_state,
    describe_tensors,
    get_bindings,
)
from et_moe.backends.cuda.build import scratch_folder
from et_moe.backends.cuda.code_cache import CodeCache, compile_cached, open_cache
from et_moe.backends.cuda.compile import CompiledMethod, CompiledRange
from et_moe.backends.cuda.gpu import gpu_for
from et_moe.backends.cuda.prepack import PREPACK_VERSION, WeightPlan, plan_weights
from et_moe.backends.method_graph import MethodGraph

FORMAT = 5
"""Version of the delegate's JSON."""

ALIGNMENT = 256
"""Bytes; of every tensor that the code is given (what `cudaMalloc` guarantees)."""


@dataclasses.dataclass(frozen=True)
class _Lowering:
    """What `preprocess` works on; ExecuTorch only hands it the opaque op."""

    methods: Mapping[str, MethodGraph]
    plan: WeightPlan
    archs: tuple[str, ...]
    cache: CodeCache | None
    own_pool: Mapping[str, int]
    compiled: dict[str, dict[str, CompiledMethod]]


_LOWERING: contextvars.ContextVar[_Lowering] = contextvars.ContextVar("lowering")

_LIBRARY = torch.library.Library("et_moe_cuda", "DEF")
_LIBRARY.define("method(str name, Tensor[] inputs) -> Tensor[]")


@torch.library.register_fake("et_moe_cuda::method", lib=_LIBRARY)
def _method_fake(name: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    graph = _LOWERING.get().methods[name]
    size = next((size for x in inputs for size in x.shape if not isinstance(size, int)), 1)
    return [
        inputs[0].new_empty([s if isinstance(s, int) else size for s in r.shape], dtype=r.dtype)
        for r in graph.output_values().values()
    ]


class _Method(torch.nn.Module):
    """A method as ExecuTorch sees it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ops.et_moe_cuda.method(self._name, inputs))


@final
class EtMoeCudaBackend(BackendDetails):
    """Delegate that runs a method's compiled code; its name is the backend's id."""

    @staticmethod
    def preprocess(
        edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> PreprocessResult:
        lowering = _LOWERING.get()
        method = {spec.key: spec.value.decode() for spec in compile_specs}["method"]
        graph, store = lowering.methods[method], NamedDataStore()
        compiled = lowering.compiled[method] = {}
        for arch in lowering.archs:
            code = compile_cached(graph, lowering.plan, arch, lowering.cache)
            for part in code.ranges:
                store.add_named_data(_blob(method, arch, part), part.code, alignment=16)
            for digest, binary in code.binaries.items():
                store.add_named_data(digest, binary, alignment=16)
            compiled[arch] = code
        return PreprocessResult(
            processed_bytes=json.dumps(
                describe(method, graph, lowering.plan, compiled)
                | {"own_pool": dict(lowering.own_pool)}
            ).encode(),
            debug_handle_map={},
            data_store_output=store.get_named_data_store_output(),
        )


def _blob(method: str, arch: str, part: CompiledRange) -> str:
    """Name of the blob that has the host program of a range."""
    return f"{method}.{arch}.{part.longest}"


class EtMoeCudaPartitioner(Partitioner):
    """Delegates the whole of a program that is one call of `et_moe_cuda::method`."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._spec = DelegationSpec(
            EtMoeCudaBackend.__name__, [CompileSpec("method", method.encode())]
        )

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        for node in exported_program.graph.nodes:
            if node.op == "call_function":
                node.meta["delegation_tag"] = "method"
        return PartitionResult(
            tagged_exported_program=exported_program, partition_tags={"method": self._spec}
        )


def describe(
    method: str, graph: MethodGraph, plan: WeightPlan, compiled: Mapping[str, CompiledMethod]
) -> dict[str, object]:
    """What a delegate has to know of a method, as JSON.

    Tensors, inputs, outputs and `hand_over` are described as in `get_bindings`, see
    `backends/bindings.py`. The code takes `inputs`, `state` and `weights` in this order and returns
    `outputs`. For each architecture there is code for each range of the size that varies from call
    to call, by rising `longest`, the largest size of a range. Where a method hands over its tokens,
    the code takes `drawn`, `int64 [2, B]`, behind all others: the token of sequence b at position p
    is left in drawn[p % 2, b], too, and the inputs that `hand_over` names are left as the next call
    takes them. Of a method that is fed drafts `drawn` is `int64 [2, B, 1 + R]`, and behind it comes
    `calls`, `int64 [B]`: how many calls before this one handed over to the next, which is counted
    on. What call c hands over is left in drawn[c % 2].
    """
    return {
        "format": FORMAT,
        "method": method,
        **describe_method(graph),
        "state": describe_state(graph),
        "weights": describe_tensors({name: plan.spec[name] for name in graph.weights}),
        "alignment": ALIGNMENT,
        "prepack": PREPACK_VERSION,
        "versions": {
            "et_moe": version("et-moe"),
            # Without the "+cpu" or "+cu130" of a build: it makes no difference.
            "torch": torch.__version__.partition("+")[0],
            "triton": triton.__version__,
        },
        "code": {
            arch: [_describe_range(_blob(method, arch, part), part) for part in code.ranges]
            for arch, code in compiled.items()
        },
    }


def _describe_range(blob: str, part: CompiledRange) -> dict[str, object]:
    return {
        "longest": part.longest,
        "data": blob,
        "bytes": len(part.code),
        "sha256": part.sha256,
        "launches": part.launches,
        "kernels": [
            {
                "name": kernel.name,
                "sha256": kernel.sha256,
                "launches": kernel.launches,
                "num_warps": kernel.num_warps,
                "shared_memory": kernel.shared_memory,
            }
            for kernel in part.kernels
        ],
    }


@dataclasses.dataclass(frozen=True)
class LoweredProgram:
    """A `.pte` and what belongs to it.

    Attributes:
        pte: its bytes.
        plan: shapes of the weights that it wants in the `.ptd`, and how to make them.
        compiled: method -> architecture -> its code and kernels.
    """

    pte: bytes
    plan: WeightPlan
    compiled: dict[str, dict[str, CompiledMethod]]

    def sidecar(self) -> str:
        """JSON for debuggers: every kernel's source, parameters and constants.

        method -> architecture -> range -> kernels, with the attributes of `inductor.Kernel`. With
        it a program that stands in for the CUDA driver can execute each launch on a CPU.
        """
        return json.dumps(
            {
                method: {
                    arch: [[dataclasses.asdict(k) for k in part.kernels] for part in code.ranges]
                    for arch, code in codes.items()
                }
                for method, codes in self.compiled.items()
            },
            indent=1,
        )


@contextlib.contextmanager
def _lowering(lowering: _Lowering) -> Iterator[None]:
    token = _LOWERING.set(lowering)
    try:
        yield
    finally:
        _LOWERING.reset(token)


def _opaque(name: str, graph: MethodGraph) -> ExportedProgram:
    """The method as ExecuTorch is to see it: its runtime inputs, one op, its outputs."""
    nodes, (low, high) = graph.input_nodes(), graph.length()
    length = Dim(f"{name}_length", min=low, max=high) if low < high else None
    examples, dims = [], []
    for value in (nodes[n].meta["val"] for n in graph.inputs):
        varying = [i for i, size in enumerate(value.shape) if not isinstance(size, int)]
        sizes = [high if i in varying else size for i, size in enumerate(value.shape)]
        examples.append(torch.zeros(sizes, dtype=value.dtype))
        dims.append(dict.fromkeys(varying, length))
    return torch.export.export(_Method(name), (examples,), dynamic_shapes=(dims,))


def _check_shapes(method: str, graph: MethodGraph) -> None:
    """Raises ValueError unless a shorter input or output is the beginning of a longer one."""
    graph.length()
    nodes, sizes = graph.input_nodes(), set()
    inputs = {f"input {name}": nodes[name].meta["val"] for name in graph.inputs}
    outputs = {f"output {name}": value for name, value in graph.output_values().items()}
    for name, value in (inputs | outputs).items():
        varying = [i for i, size in enumerate(value.shape) if not isinstance(size, int)]
        if any(i in varying or value.shape[i] != 1 for i in range(max(varying, default=0))):
            raise ValueError(f"method {method}: {name} varies in an inner dimension")
        found = {value.shape[i].node.expr for i in varying}
        if name in inputs:
            sizes |= found
        elif not found <= sizes:
            raise ValueError(f"method {method}: {name} varies with no input")


def lower(
    methods: dict[str, MethodGraph],
    archs: list[str],
    constant_methods: dict[str, object],
    cache_dir: Path | None,
    own_pool: Mapping[str, int],
) -> LoweredProgram:
    """Compiles methods for CUDA architectures and puts them into a `.pte`.

    Args:
        methods: by name, with the same state and weights.
        archs: of `gpu.ARCHS`, at least one.
        constant_methods: further methods without inputs: ints and strings.
        cache_dir: folder of compiled code that is reused and kept, see `code_cache`; None for none.
        own_pool: pages and slots of the state that a delegate has for callers that choose no number
            themselves, by pool.

    Raises:
        ValueError: an unknown architecture, none at all, methods that differ in state or a weight,
            or one in which more than one size varies from call to call, or an inner one.
        RuntimeError, UnsupportedOpError: see `compile_method`.
    """
    if not archs:
        raise ValueError("no CUDA architecture given")
    for arch in archs:
        gpu_for(arch)
    for name, graph in methods.items():
        _check_shapes(name, graph)
    plan = plan_weights(methods)
    cache = open_cache(cache_dir)
    own_archs = tuple(dict.fromkeys(archs))
    lowering = _Lowering(methods, plan, own_archs, cache, own_pool, compiled={})
    constants = {
        **constant_methods,
        "get_backend": json.dumps("cuda"),
        "get_bindings": get_bindings(methods, plan.spec, dict.fromkeys(methods, 0)),
    }
    # Methods and architectures share what is compiled there.
    with scratch_folder(), _lowering(lowering):
        program = to_edge_transform_and_lower(
            {name: _opaque(name, graph) for name, graph in methods.items()},
            partitioner={name: [EtMoeCudaPartitioner(name)] for name in methods},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constants,
        ).to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                # Methods read their inputs where the runner has them, instead of copies.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    return LoweredProgram(program.buffer, lowering.plan, lowering.compiled)
