"""Builds a host program into a shared object, reproducibly."""

import contextlib
import contextvars
import hashlib
import os
import platform
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from et_moe.backends.cuda.errors import ToolchainError
from et_moe.backends.cuda.gpu import cuda_include_dir, ptxas
from et_moe.backends.cuda.host_program import run_body, split_interface
from et_moe.backends.cuda.inductor import UnsupportedOpError

MARCH = "x86-64"
"""The host program launches kernels and computes nothing: it is for any processor of the kind."""

RUNTIME_FUNCTIONS = frozenset(
    f"aoti_torch_{name}"
    for name in (
        "clone",
        "clone_preserve_strides",
        "create_cuda_stream_guard",
        "create_tensor_from_blob",
        "create_tensor_from_blob_v2",
        "delete_cuda_stream_guard",
        "delete_tensor_object",
        "device_type_cpu",
        "device_type_cuda",
        "dtype_bfloat16",
        "dtype_bool",
        "dtype_float16",
        "dtype_float32",
        "dtype_int32",
        "dtype_int64",
        "dtype_int8",
        "dtype_uint8",
        "empty_strided",
        "get_data_ptr",
        "get_device_type",
        "get_dim",
        "get_dtype",
        "get_numel",
        "get_sizes",
        "get_storage_offset",
        "get_storage_size",
        "get_strides",
        "grad_mode_is_enabled",
        "grad_mode_set_enabled",
        "new_tensor_handle",
        "_reinterpret_tensor",
        "warn",
    )
)
"""All that a shared object may ask of the program that loads it, besides the CUDA driver and
runtime: tensors, but no op. In its code the names have the prefix `et_moe_`."""

_COMPILE = [
    "g++",
    "-std=c++20",
    "-O1",
    f"-march={MARCH}",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffunction-sections",
    "-fdata-sections",
    "-DNDEBUG",
    "-DUSE_CUDA",
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
    "-DSTANDALONE_TORCH_HEADER",
    "-DTORCH_INDUCTOR_CPP_WRAPPER",
]

_LINK = [
    "g++",
    "-shared",
    # Needs no newer C++ library than the machine that runs it has; but it shares the unwinder with
    # its caller (libgcc_s), since exceptions leave the code.
    "-static-libstdc++",
    "-s",
    "-Wl,--build-id=none,--gc-sections,--exclude-libs,ALL,--version-script=exports.map",
]

_EXPORTS = "{ global: AOTInductor*; local: *; };\n"

_CONSTANTS = """.section .note.GNU-stack,"",@progbits
.section .rodata
.global _binary_constants_bin_start
_binary_constants_bin_start:
.global _binary_constants_bin_end
_binary_constants_bin_end:
.byte 0
"""
"""Assembly of the constants, of which there are none."""


_SCRATCH: contextvars.ContextVar[Path | None] = contextvars.ContextVar("scratch", default=None)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Inside the block all temporary files lie in one folder, which is removed at its end.

    Those of this process and of the compilers that it starts: when an exception or a signal ends
    them, Triton, ptxas and g++ leave files behind. Blocks inside a block have its folder, and so
    what is compiled in one of them need not be compiled again in the next.
    """
    if outer := _SCRATCH.get():
        yield outer
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tempfile, "tempdir", folder),
        mock.patch.dict(os.environ, {"TMPDIR": folder}),
    ):
        token = _SCRATCH.set(Path(folder))
        try:
            yield Path(folder)
        finally:
            _SCRATCH.reset(token)


def _run(command: list[str], folder: Path) -> str:
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except FileNotFoundError:
        raise ToolchainError(f"{command[0]} not found: a C++ compiler is needed") from None
    with process:
        try:
            output, errors = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the programs that g++ has started
            raise
    if process.returncode:
        raise ToolchainError(f"{command[0]} failed on the host program:\n{errors[-4000:]}")
    return output


def toolchain() -> str:
    """Versions of what makes code: the C++ compiler, the CUDA headers and the assembler.

    Raises:
        ToolchainError: one of them is missing, or this is no x86-64 machine.
    """
    if (machine := platform.machine()) != "x86_64":
        raise ToolchainError(
            f"compiling for CUDA needs an x86-64 machine, this is {machine}: a program holds code "
            "for the processor beside the GPU, too"
        )
    compiler = _run(["g++", "--version"], Path.cwd()).splitlines()[0]
    _run(["nm", "--version"], Path.cwd())
    header = (cuda_include_dir() / "cuda.h").read_text()
    cuda = re.search(r"#define CUDA_VERSION (\d+)", header)
    assembler = _run([str(ptxas()), "--version"], Path.cwd()).splitlines()[-1]
    return f"{compiler}; CUDA {cuda[1] if cuda else 'unknown'}; {assembler}"


def _compiler() -> list[str]:
    """The command that compiles C++ of a host program, without its files."""
    torch_headers = Path(torch.__file__).parent / "include"
    headers = {
        torch_headers: "torch",
        torch_headers / "torch/csrc/api/include": "torch_api",
        cuda_include_dir(): "cuda",
    }
    renamed = [f"-D{name}=et_moe_{name}" for name in sorted(RUNTIME_FUNCTIONS)]
    includes = [f"-isystem{path}" for path in headers]
    prefixes = [f"-ffile-prefix-map={path}={short}" for path, short in headers.items()]
    return [*_COMPILE, *renamed, *includes, *prefixes]


_SHARED_TEMPLATE = """template class torch::aot_inductor::AOTInductorModelBase<
    torch::aot_inductor::AOTInductorModel>;
"""
"""Most of a host program's code; only the object of the interface has it."""


def _shared(interface: str, scratch: Path) -> Path:
    """A folder with what host programs of one interface share: their headers, compiled ahead
    (`headers.h.gch`), and the objects of interface and constants. It is made once in `scratch`.
    """
    folder = scratch / f"host-{hashlib.sha256(interface.encode()).hexdigest()}"
    if folder.exists():
        return folder
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        work = Path(name, "host")
        work.mkdir()
        included = re.findall(r"^#include .*\n", interface, re.MULTILINE)
        (work / "headers.h").write_text("".join(included))
        (work / "interface.cpp").write_text(interface + _SHARED_TEMPLATE)
        (work / "constants.S").write_text(_CONSTANTS)
        _run([*compiler, "-x", "c++-header", "headers.h", "-o", "headers.h.gch"], work)
        _run([*compiler, "-include", "headers.h", "-c", "interface.cpp"], work)
        _run([*compiler, "-c", "constants.S"], work)
        work.rename(folder)
    return folder


def build(source: str) -> bytes:
    """Compiles and links the C++ text of a host program.

    The result exports AOTInductor's C interface, is for x86-64, and asks its loader for nothing
    but CUDA, `RUNTIME_FUNCTIONS` and its kernels (`host_program.FIND_KERNEL`). The same input gives
    the same bytes in any folder. Inside `scratch_folder` the interface is compiled once.

    Raises:
        UnsupportedOpError: the program calls a library op.
        ToolchainError: the C++ compiler is missing or fails.
    """
    _check_functions(run_body(source))
    interface, program = split_interface(source)
    with scratch_folder() as scratch, tempfile.TemporaryDirectory() as name:
        shared, folder = _shared(interface, scratch), Path(name)
        (folder / "host.cpp").write_text(f"extern {_SHARED_TEMPLATE}" + program)
        (folder / "exports.map").write_text(_EXPORTS)
        _run([*_compiler(), "-include", str(shared / "headers.h"), "-c", "host.cpp"], folder)
        objects = ["host.o", *(str(shared / name) for name in ("interface.o", "constants.o"))]
        _run([*_LINK, *objects, "-o", "host.so"], folder)
        _check_functions(_run(["nm", "-D", "--undefined-only", "host.so"], folder))
        return (folder / "host.so").read_bytes()


def _check_functions(text: str) -> None:
    needed = set(re.findall(r"\b(aoti_torch\w+)", text))
    if unknown := sorted(needed - RUNTIME_FUNCTIONS):
        raise UnsupportedOpError(f"ops without a kernel are left in the graph: {unknown}")
