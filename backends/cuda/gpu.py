"""GPUs that code is compiled for, and how a compiler is made to believe that one is present."""

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from et_moe.backends.cuda.errors import ToolchainError

SUPPORTED_VERSIONS = {"2.13": "3.7"}
"""torch version -> triton version that `pretend_gpu` was tested with."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What compilers ask of a device. Sizes in bytes.

    Sources: NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability
    (shared memory, registers, threads); NVIDIA's architecture white papers and data sheets
    (multiprocessors, L2, memory). `name` is what the driver reports.
    """

    name: str
    arch: str
    sm_count: int
    l2_cache: int
    memory: int
    shared_memory_per_block: int
    shared_memory_per_sm: int
    threads_per_sm: int
    registers_per_sm: int = 65536

    @property
    def compute_capability(self) -> tuple[int, int]:
        return divmod(int(self.arch.removeprefix("sm_")), 10)


def _gpu(name: str, arch: str, sm_count: int, l2_mib: int, memory_gib: int) -> Gpu:
    # Per compute capability: shared memory of a block (opt-in) and of an SM in KiB, threads.
    block, sm, threads = {
        "sm_80": (163, 164, 2048),
        "sm_86": (99, 100, 1536),
        "sm_89": (99, 100, 1536),
        "sm_90": (227, 228, 2048),
        "sm_100": (227, 228, 2048),
        "sm_120": (99, 100, 1536),
    }[arch]
    return Gpu(name, arch, sm_count, l2_mib << 20, memory_gib << 30, block << 10, sm << 10, threads)


GPUS = (
    _gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 40, 80),
    _gpu("NVIDIA A10", "sm_86", 72, 6, 24),
    _gpu("NVIDIA GeForce RTX 3090", "sm_86", 82, 6, 24),
    _gpu("NVIDIA L4", "sm_89", 58, 48, 24),
    _gpu("NVIDIA GeForce RTX 4090", "sm_89", 128, 72, 24),
    _gpu("NVIDIA H200", "sm_90", 132, 60, 141),
    _gpu("NVIDIA H100 80GB HBM3", "sm_90", 132, 50, 80),
    _gpu("NVIDIA B200", "sm_100", 148, 126, 180),
    _gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 96, 32),
)

ARCHS = tuple(dict.fromkeys(gpu.arch for gpu in GPUS))


TWINS = {"sm_103": "sm_100", "sm_121": "sm_120"}
"""Architectures without a GPU in the table -> the one whose limits and tuning they share."""


def gpu_for(arch: str) -> Gpu:
    """The GPU that code for an architecture is tuned for: the first of its kind in `GPUS`, or of
    its twin's.

    Raises:
        ValueError: an architecture that is neither in the table nor a twin.
    """
    for gpu in GPUS:
        if gpu.arch == TWINS.get(arch, arch):
            return dataclasses.replace(gpu, arch=arch)
    expected = tuple(sorted((*ARCHS, *TWINS), key=lambda name: int(name.removeprefix("sm_"))))
    raise ValueError(f"CUDA architecture {arch!r} is not supported: expected one of {expected}")


def default_archs() -> list[str]:
    """The architectures of this machine's GPUs, or all of `ARCHS` on a machine without one.

    Raises:
        ValueError: the machine's GPU is of an architecture that is not in the table.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return list(ARCHS)
    found = dict.fromkeys("sm_" + line.replace(".", "").strip() for line in answer.stdout.split())
    return [gpu_for(arch).arch for arch in found] or list(ARCHS)


def _toolkit_folders() -> list[Path]:
    """Where the `nvidia-*` wheels of CUDA 13 (extra `cuda`) put their files."""
    try:
        import nvidia.cu13
    except ImportError:
        return []
    return [Path(root) for root in nvidia.cu13.__path__]


def cuda_include_dir() -> Path:
    """Folder of `cuda.h` and `cuda_runtime.h`, from the `nvidia-cuda-*` wheels (extra `cuda`).

    Raises:
        ToolchainError: the wheels are not installed.
    """
    for folder in (root / "include" for root in _toolkit_folders()):
        if all((folder / header).is_file() for header in ("cuda.h", "cuda_runtime.h", "nv/target")):
            return folder
    raise ToolchainError("no CUDA headers found: install them with `pip install 'et-moe[cuda]'`")


def ptxas() -> Path:
    """The assembler, from the `nvidia-cuda-nvcc` wheel (extra `cuda`).

    Not the one of Triton: 12.8 makes wrong code of matrix products whose left operand is in
    registers (of the chunked gated delta rule at 32 value columns a head, on an H200; 13.0 does
    not, nor does 12.8 without optimisation).

    Raises:
        ToolchainError: the wheel is not installed.
    """
    for file in (root / "bin/ptxas" for root in _toolkit_folders()):
        if file.is_file():
            return file
    raise ToolchainError("no ptxas found: install it with `pip install 'et-moe[cuda]'`")


def ptxas_environment() -> dict[str, str]:
    """Makes Triton use `ptxas`, for all architectures."""
    return dict.fromkeys(("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"), str(ptxas()))


def check_versions() -> None:
    """Raises ToolchainError unless torch and triton are versions that `pretend_gpu` knows."""
    found = (torch.__version__, triton.__version__)
    torch_version, triton_version = (".".join(version.split(".")[:2]) for version in found)
    if SUPPORTED_VERSIONS.get(torch_version) != triton_version:
        known = ", ".join(f"torch {t} with triton {v}" for t, v in SUPPORTED_VERSIONS.items())
        raise ToolchainError(
            f"compiling for CUDA is not supported with torch {torch.__version__} and "
            f"triton {triton.__version__}: expected {known}"
        )


class _Driver:
    """A Triton driver for a GPU that is not there: kernels are compiled, never loaded or run."""

    def __init__(self, gpu: Gpu) -> None:
        major, minor = gpu.compute_capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)
        limits = {
            "max_shared_mem": gpu.shared_memory_per_block,
            "max_num_regs": gpu.registers_per_sm,
            "multiprocessor_count": gpu.sm_count,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits,
            # module, function, registers, spills, threads: Triton checks the last against a launch.
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
        )

    def launcher_cls(self, source, metadata):
        return lambda *args: None

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda


def _properties(gpu: Gpu) -> SimpleNamespace:
    """The fields of torch's `_CudaDeviceProperties`."""
    major, minor = gpu.compute_capability
    return SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        total_memory=gpu.memory,
        multi_processor_count=gpu.sm_count,
        warp_size=32,
        max_threads_per_multi_processor=gpu.threads_per_sm,
        max_threads_per_block=1024,
        regs_per_multiprocessor=gpu.registers_per_sm,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_memory_per_block,
        shared_memory_per_multiprocessor=gpu.shared_memory_per_sm,
        L2_cache_size=gpu.l2_cache,
        gcnArchName="",
    )


def _patches(gpu: Gpu) -> list[tuple[object, dict[str, object]]]:
    """(object, attribute -> value while pretending) for everything that asks about a device."""
    import torch._inductor.async_compile as async_compile
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers

    properties, capability = _properties(gpu), gpu.compute_capability
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
    }
    interface = {
        **answers,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "get_compute_capability": lambda device=None: 10 * capability[0] + capability[1],
    }
    worker = {k: answers[k] for k in ("get_device_properties", "current_device")}
    torch_cuda = {
        **answers,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: gpu.name,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    driver = _Driver(gpu)
    return [
        (torch.version, {"cuda": "13.0", "hip": None}),
        (torch.cuda, torch_cuda),
        (CudaInterface, {k: staticmethod(v) for k, v in interface.items()}),
        (CudaInterface.Worker, {k: staticmethod(v) for k, v in worker.items()}),
        (triton.runtime.driver, {"_default": driver, "_active": driver}),
        # Would allocate a tensor on the device.
        (fake_tensor, {"init_gpu_context": lambda device: None}),
        # Would look for a driver library, and replace ours by it.
        (triton_helpers, {"set_driver_to_gpu": lambda: None}),
        # Would prefer the ptxas of a CUDA build of torch to Triton's: other code on such a machine.
        (async_compile, {"_set_triton_ptxas_path": lambda: None}),
    ]


def _forget_device() -> None:
    """Empties the caches in which torch and Triton keep what they learned about the device."""
    import torch.utils._triton as torch_triton
    from torch._dynamo.debug_utils import _cuda_system_info_comment
    from torch._inductor.codecache import CacheBase
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.utils import clear_caches, get_gpu_type
    from triton.compiler.compiler import max_shared_mem

    functions = [
        *vars(torch_triton).values(),
        _cuda_system_info_comment,
        CacheBase.get_system,
        DeviceProperties.create,
        get_gpu_type,
        max_shared_mem,
    ]
    for function in functions:
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    clear_caches()


@contextlib.contextmanager
def pretend_gpu(gpu: Gpu) -> Iterator[None]:
    """Inside the block torch and Triton compile for `gpu` as if it were device 0 of this machine.

    Works the same with and without a real GPU, which is never touched. Everything is put back when
    the block ends, also by an exception. Not for use in several threads at once.

    Raises:
        ToolchainError: versions of torch or triton that this was not tested with, or Triton's
            interpreter is on, under which there are no kernels to compile.
    """
    check_versions()
    if triton.knobs.runtime.interpret:
        raise ToolchainError(
            "cannot compile for CUDA under Triton's interpreter: unset TRITON_INTERPRET"
        )
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_device)
        for target, values in _patches(gpu):
            for name, value in values.items():
                stack.enter_context(mock.patch.object(target, name, value))
        _forget_device()
        yield
