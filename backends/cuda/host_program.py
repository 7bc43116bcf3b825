"""The text of the C++ program with which Inductor launches kernels: read, and changed."""

import dataclasses
import re
from collections.abc import Iterator, Mapping


def run_body(source: str) -> str:
    """The part of a host program that runs per call."""
    start = source.index("void AOTInductorModel::run_impl(")
    return source[start : source.index("} // AOTInductorModel::run_impl", start)]


def split_interface(source: str) -> tuple[str, str]:
    """A host program in two parts: AOTInductor's C interface, with its includes, which is the same
    for all, and what is of this program alone and needs nothing but these includes."""
    start = source.find("#define CUDA_DRIVER_CHECK(EXPR)")
    if not 0 <= source.find("AOTIRuntimeError AOTInductorModelContainerRun(") < start:
        raise RuntimeError("torch generates another host program than expected")
    return source[:start], source[start:]


def kernel_calls(source: str) -> Iterator[tuple[str, list[str]]]:
    """(kernel name, argument expressions) of every launch of a call, in order."""
    for match in re.finditer(r"^    call_(\w+)\((.*)\);$", run_body(source), re.MULTILINE):
        yield match[1], _split_arguments(match[2])


def _split_arguments(text: str) -> list[str]:
    arguments, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return [a.strip() for a in arguments]


_LAUNCH = "static inline void launchKernel("

_LAUNCH_DEPENDENT = """static inline void launchDependentKernel(
    CUfunction func, uint32_t gridX, uint32_t gridY, uint32_t gridZ, uint32_t numWarps,
    uint32_t sharedMemBytes, void* args[], cudaStream_t stream) {
  CUlaunchAttribute attribute{};
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = gridX;
  config.gridDimY = gridY;
  config.gridDimZ = gridZ;
  config.blockDimX = 32 * numWarps;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = sharedMemBytes;
  config.hStream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CUDA_DRIVER_CHECK(cuLaunchKernelEx(&config, func, args, nullptr));
}
"""
"""For kernels that wait for their predecessor themselves: `triton/common/dependent_launch.py`."""


FIND_KERNEL = "et_moe_find_kernel"
"""Function of the program that loads the code: the binary with a SHA-256, in hexadecimal."""


def find_kernels(source: str, digests: Mapping[str, str]) -> str:
    """The host program with kernels that it asks its loader for, instead of kernels inside it.

    Args:
        digests: SHA-256 of the binary by the name of the kernel, for all kernels.
    """
    declared = f'extern "C" const void* {FIND_KERNEL}(const char* sha256);\n'
    source = source.replace(_LAUNCH, declared + _LAUNCH, 1)
    for name, digest in digests.items():
        load = f"loadKernel(__{name}_start,"
        if source.count(load) != 1:
            raise RuntimeError("torch generates another host program than expected")
        source = source.replace(load, f'loadKernel({FIND_KERNEL}("{digest}"),')
    return source


@dataclasses.dataclass(frozen=True)
class Accesses:
    """Parameters of a kernel, all as names in its `call_` function.

    Attributes:
        arguments: of that function, in order.
        early: read before the kernel before has ended; None if the kernel does not wait for it.
        written: stored through.
        starts_next_early: whether it lets the next kernel start before the one before has ended.
    """

    arguments: list[str]
    early: set[str] | None
    written: set[str]
    starts_next_early: bool = False


def _tensors(names: set[str], accesses: Accesses, arguments: list[str]) -> set[str]:
    """The host program's tensors behind some parameters in a call."""
    given = dict(zip(accesses.arguments, arguments, strict=False))
    tensors = set()
    for name in names:
        # A view in another shape, such as tmp_buf4_1, is of the tensor in its name.
        found = re.findall(r"\b(?:tmp_(buf\d+)_\d+|((?:buf|arg)\d+\w*))", given[name])
        if not found:
            raise RuntimeError(f"argument {given[name]} of a kernel names no tensor")
        tensors.update(viewed or own for viewed, own in found)
    return tensors


def find_dependents(source: str, kernels: dict[str, Accesses]) -> set[str]:
    """Kernels that may start before their predecessor ends: in no call do they read early what may
    not have been written yet. What comes before the first call is not known."""
    dependents = {name for name, kernel in kernels.items() if kernel.early is not None}
    while True:
        unsafe = _too_early(source, kernels, dependents)
        if not unsafe:
            return dependents
        dependents -= unsafe


def _too_early(source: str, kernels: dict[str, Accesses], dependents: set[str]) -> set[str]:
    """The dependents that are none, because of kernels that may not have ended when they start."""
    unsafe, fresh = set(), None  # `fresh`: written by those; None: anything
    for name, arguments in kernel_calls(source):
        kernel = kernels[name]
        if name not in dependents:
            fresh = set()
        elif fresh is None or (kernel.early and fresh & _tensors(kernel.early, kernel, arguments)):
            unsafe.add(name)
        if not kernel.starts_next_early:
            fresh = set()
        fresh = (fresh or set()) | _tensors(kernel.written, kernel, arguments)
    return unsafe


def launch_dependents(source: str, dependents: set[str]) -> str:
    """The host program with programmatic dependent launches of the kernels named."""
    if dependents:
        source = source.replace(_LAUNCH, _LAUNCH_DEPENDENT + _LAUNCH, 1)
    for name in dependents:
        call = f"launchKernel(kernels_.{name},"
        if call not in source:
            raise RuntimeError("torch generates another host program than expected")
        source = source.replace(call, call.replace("launchKernel", "launchDependentKernel"))
    return source
