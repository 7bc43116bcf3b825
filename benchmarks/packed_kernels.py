"""Kernels that are compiled on one machine and launched on another, which has the GPU.

Programs have the machine code that Triton makes where they are exported. Another version makes
other code of the same kernel, and what it is worth to tune: a kernel that keeps its operands in
registers with Triton 3.7.1 sends them through shared memory with 3.6 and takes twice as long.
So the kernels that a tuner times are packed into a file where programs are made.

The file is a zip of machine code, and of an index: a launch's `Job`, as a digest, to its file, its
bytes of shared memory, and how many parameters it has. Triton puts parameters of its own behind
those of the kernel's source; they are null pointers here, since kernels of ours do not use them.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

from et_moe.backends.atomic_file import write_file
from et_moe.backends.cuda.triton.cases.launches import Launch, replace_launches
from et_moe.benchmarks.static.collect import Job, job_of
from et_moe.benchmarks.static.compile import compile_source, count_parameters, start_worker

_INDEX = "index.json"
# Of the driver's cuda.h.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_WITHOUT_ATTRIBUTE = 48 * 1024


def _digest(job: Job) -> str:
    return hashlib.sha256(repr(job).encode()).hexdigest()


def _compile(job: Job) -> tuple[bytes, int, int] | str:
    """Machine code, bytes of shared memory and number of parameters; a message if it fails."""
    target = GPUTarget("cuda", int(job.arch.removeprefix("sm_")), 32)
    try:
        with contextlib.redirect_stdout(None):
            asm, shared_memory = compile_source(job, target)
    except Exception as e:  # a configuration that does not compile is only not timed
        return f"{type(e).__name__}: {str(e)[-200:]}"
    return asm["cubin"], shared_memory, count_parameters(asm["ptx"])


def pack_kernels(jobs: Iterable[Job], path: Path, processes: int) -> list[str]:
    """Compiles all different jobs and packs them into the file `path`.

    Returns:
        What could not be compiled, and why.
    """
    different, index, faults = list(dict.fromkeys(jobs)), {}, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        packed = Path(folder, "packed.zip")
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_worker)
        with pool, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as file:
            for job, result in zip(different, pool.map(_compile, different), strict=True):
                if isinstance(result, str):
                    faults.append(f"{job.kernel} {job.configuration}: {result}")
                    continue
                code, shared_memory, parameters = result
                name = f"{len(index)}.cubin"
                file.writestr(name, code)
                index[_digest(job)] = {
                    "file": name,
                    "shared_memory": shared_memory,
                    "parameters": parameters,
                }
            file.writestr(_INDEX, json.dumps(index))
        write_file(path, packed.read_bytes())
    return faults


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z")),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


_SCALARS = {"fp32": ctypes.c_float, "i64": ctypes.c_int64, "i1": ctypes.c_bool}


class PackedKernels:
    """The kernels of a file of `pack_kernels`, loaded when they are first launched."""

    def __init__(self, path: Path, driver: ctypes.CDLL | None = None) -> None:
        """Args:
            driver: CUDA's; by default the one of this machine.

        Raises:
            ValueError: the file is none of `pack_kernels`.
            OSError: it cannot be read.
        """
        try:
            self._file = zipfile.ZipFile(path)
            self._index = json.loads(self._file.read(_INDEX))
        except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as e:
            raise ValueError(f"{path}: not a file of packed kernels: {e}") from e
        self._path = path
        self._given = driver
        self._loaded: dict[str, ctypes.c_void_p] = {}

    @functools.cached_property
    def _driver(self) -> ctypes.CDLL:
        return self._given or ctypes.CDLL("libcuda.so.1")

    def _check(self, error: int, what: str) -> None:
        if error:
            raise RuntimeError(f"CUDA error {error}: {what}")

    def _load(self, key: str, kernel: str) -> ctypes.c_void_p:
        if key not in self._loaded:
            entry = self._index[key]
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            code = self._file.read(entry["file"])
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code), kernel)
            found = self._driver.cuModuleGetFunction(
                ctypes.byref(function), module, kernel.encode()
            )
            self._check(found, kernel)
            if entry["shared_memory"] > _WITHOUT_ATTRIBUTE:
                allowed = self._driver.cuFuncSetAttribute(
                    function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, entry["shared_memory"]
                )
                self._check(allowed, kernel)
            self._loaded[key] = function
        return self._loaded[key]

    def launch(self, launch: Launch, arch: str, stream: int) -> None:
        """Launches on a stream, before the kernel ahead of it ends, as programs do.

        Raises:
            KeyError: the file lacks this kernel.
            RuntimeError: the driver refuses.
            OSError: there is no driver.
        """
        job = job_of(launch, arch)
        key = _digest(job)
        if key not in self._index:
            raise KeyError(f"{self._path} lacks {job.kernel} {job.configuration}")
        function, entry = self._load(key, job.kernel), self._index[key]
        values: list[ctypes._SimpleCData] = []
        for name, kind in job.signature:
            value = launch.arguments.get(name)
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(_SCALARS.get(kind, ctypes.c_int)(value))
        values += [ctypes.c_void_p() for _ in range(entry["parameters"] - len(values))]
        pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        dependent = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1, b"")
        early = int(arch.removeprefix("sm_")) >= 90
        threads = 32 * launch.options.get("num_warps", 4)
        grid = (*launch.grid, 1, 1)[:3]
        config = _Config(*grid, threads, 1, 1, entry["shared_memory"], stream)
        config.attributes, config.attribute_count = ctypes.pointer(dependent), int(early)
        arguments = (ctypes.c_void_p * len(pointers))(*pointers)
        error = self._driver.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
        self._check(error, f"launch of {job.kernel} {job.configuration}")


@contextlib.contextmanager
def launched_from(kernels: PackedKernels) -> Iterator[None]:
    """A block in which ops launch packed kernels on this GPU, on torch's current stream."""
    major, minor = torch.cuda.get_device_capability()

    def run(launch: Launch) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        kernels.launch(launch, f"sm_{major}{minor}", stream)

    with replace_launches(run):
        yield
