"""Executes a CUDA program's launches on a CPU: each runs its kernel's own source under Triton's
interpreter, on the arguments that the compiled host code passed.

The fake driver (interpreter.cpp) starts it and sends one launch at a time as a line of JSON:
module, kernel, grid, the bytes of the arguments, and the live allocations of device memory; the
module's binary comes with its first launch, and names the kernel in the sidecar by its digest. The
reply is a line {"error": text}, with an empty text for success. Device memory is mapped at the
addresses that the program uses.
"""

import ctypes
import hashlib
import importlib.util
import inspect
import json
import mmap
import os
import socket
import struct
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import triton
import triton.language as tl
import triton_interpreter
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter

FORMATS = {
    "i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q",
    "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
"""Triton's names of scalar parameters -> letters of `struct`."""

SCRATCH_PARAMETERS = 2
"""Pointers to scratch memory that a launch passes behind a kernel's own parameters."""


@triton.jit
def _rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log1p(x):
    return tl.log(1.0 + x)


class Libdevice:
    """Plain equivalents of the functions of CUDA's device library that Inductor's kernels call."""

    rsqrt, exp, log1p = _rsqrt, _exp, _log1p


class Memory:
    """Device memory, and which parts of it may be touched."""

    def __init__(self, file: int, base: int, size: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        noreserve, fixed_noreplace = 0x4000, 0x100000  # flags that Python's `mmap` does not name
        address = libc.mmap(
            ctypes.c_void_p(base),
            ctypes.c_size_t(size),
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | noreserve | fixed_noreplace,
            file,
            ctypes.c_long(0),
        )
        if address != base:
            raise OSError(ctypes.get_errno(), "device memory cannot be mapped")
        self.set_allocations([])

    def set_allocations(self, allocations: list[list[int]]) -> None:
        """Takes the live allocations, [address, bytes] each, sorted by address."""
        table = np.array(allocations, dtype=np.uint64).reshape(-1, 2)
        self._begin, self._end = table[:, 0], table[:, 0] + table[:, 1]

    def check(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, what: str) -> None:
        """Raises IndexError if an address, where the mask is set, is not all in one allocation."""
        if mask is not None:  # a mask that was made from a scalar may consist of integers
            pointers = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)]
        touched = pointers.reshape(-1)
        i = np.searchsorted(self._begin, touched, side="right")
        inside = i > 0
        inside[inside] = touched[inside] + np.uint64(itemsize) <= self._end[i[inside] - 1]
        if not inside.all():
            address = int(touched[~inside][0])
            raise IndexError(f"{what} of {itemsize} bytes at {address:#x}, outside of live memory")


class CheckedInterpreter:
    """Stands in for Triton's module of memory accesses, and checks the addresses first."""

    def __init__(self, module, memory: Memory) -> None:
        self._module, self._memory = module, memory

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def load(self, pointers, mask, other, dtype):
        self._memory.check(pointers, mask, np.dtype(dtype).itemsize, "load")
        return self._module.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._memory.check(pointers, mask, value.dtype.itemsize, "store")
        return self._module.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, semantics):
        self._memory.check(pointers, mask, value.dtype.itemsize, "atomic access")
        return self._module.atomic_rmw(op, pointers, value, mask, semantics)

    def atomic_cas(self, pointers, compare, value, semantics):
        self._memory.check(pointers, None, value.dtype.itemsize, "atomic access")
        return self._module.atomic_cas(pointers, compare, value, semantics)


class Kernel:
    """A kernel of the sidecar, ready to run."""

    def __init__(self, entry: dict, folder: Path) -> None:
        self._parameters = [(name, kind) for name, kind in entry["parameters"]]
        self._constants = {k: _constant(v) for k, v in entry["constants"].items()}
        # The interpreter rewrites source text, which it reads from a file.
        path = folder / f"kernel_{entry['sha256']}.py"
        path.write_text(entry["source"])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._function = getattr(module, entry["function"])
        names = list(inspect.signature(self._function.fn).parameters)
        given = [name for name, _ in self._parameters] + list(self._constants)
        if sorted(given) != sorted(names):
            raise ValueError(f"{entry['name']} takes {names}, the sidecar gives {given}")

    def run(self, grid: list[int], arguments: list[bytes]) -> None:
        if len(arguments) != len(self._parameters) + SCRATCH_PARAMETERS:
            raise ValueError(
                f"{len(arguments)} arguments, the sidecar has {len(self._parameters)} parameters"
                f" and {SCRATCH_PARAMETERS} for scratch memory"
            )
        values = {
            name: _argument(kind, data)
            for (name, kind), data in zip(self._parameters, arguments, strict=False)
        }
        with np.errstate(all="ignore"):  # lanes that are masked later compute nonsense
            self._function[tuple(grid)](**values, **self._constants)


def _constant(value: object) -> object:
    return getattr(tl, value["dtype"]) if isinstance(value, dict) else value


def _argument(kind: str, data: bytes) -> tl.tensor:
    """A parameter as the kernel sees it, of exactly its declared type."""
    code = "Q" if kind.startswith("*") else FORMATS[kind]
    if struct.calcsize(code) != len(data):
        raise ValueError(f"a parameter of type {kind} has {len(data)} bytes")
    type_ = tl.str_to_ty(kind, None)
    dtype = np.dtype(code if code != "?" else bool)
    value = np.array(struct.unpack(code, data), dtype=dtype)
    return tl.tensor(interpreter.TensorHandle(value, type_), type_)


class Server:
    """Finds the kernel of each launch, and runs it."""

    def __init__(self, sidecar: Path, memory: Memory, folder: Path) -> None:
        methods = json.loads(sidecar.read_text())
        codes = (ranges for archs in methods.values() for ranges in archs.values())
        kernels = (kernel for ranges in codes for part in ranges for kernel in part)
        self._entries = {kernel["sha256"]: kernel for kernel in kernels}
        self._memory, self._folder = memory, folder
        self._digests: dict[int, str] = {}
        self._kernels: dict[str, Kernel] = {}

    def launch(self, message: dict) -> None:
        if "image" in message:
            image = bytes.fromhex(message["image"])
            self._digests[message["module"]] = hashlib.sha256(image).hexdigest()
        digest = self._digests[message["module"]]
        if digest not in self._kernels:
            if digest not in self._entries:
                raise KeyError(f"kernel {message['kernel']} is not in the sidecar: not its program")
            self._kernels[digest] = Kernel(self._entries[digest], self._folder)
        self._memory.set_allocations(message["allocations"])
        self._kernels[digest].run(message["grid"], [bytes.fromhex(a) for a in message["arguments"]])

    def answer(self, line: str) -> str:
        try:
            self.launch(json.loads(line))
            return ""
        except Exception as e:
            traceback.print_exc()
            return f"{type(e).__name__}: {e}"


def main() -> None:
    sidecar, connection, file, base, size = sys.argv[1:]
    memory = Memory(int(file), int(base), int(size))
    triton_helpers.libdevice = Libdevice
    interpreter._interpreter = CheckedInterpreter(interpreter._interpreter, memory)
    triton_interpreter.install()
    with (
        socket.socket(fileno=int(connection)) as stream,
        stream.makefile("rw") as lines,
        tempfile.TemporaryDirectory() as folder,
    ):
        server = Server(Path(sidecar), memory, Path(folder))
        for line in lines:
            lines.write(json.dumps({"error": server.answer(line)}) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
