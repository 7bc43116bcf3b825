"""What a CUDA `.pte` holds, without running it."""

import hashlib
import json

from executorch.exir._serialize._program import PTEFile
from executorch.exir.schema import DataLocation, Program
from rich.console import Console
from rich.table import Table

from et_moe.backends.cuda.backend import FORMAT, EtMoeCudaBackend
from et_moe.backends.program_file import constants_of, print_constants, print_methods


def describe(file: PTEFile, size: int) -> dict[str, object]:
    """Describes a `.pte` of `lower` with so many bytes; all of it can be written as JSON.

    Returns:
        `backend`: its id; `bytes`: of the file; `constants`: constant method -> value; `methods`:
        method -> what `backend.describe` says of it (inputs, outputs, hand_over, state, weights,
        versions, prepack, and per architecture and range the largest size, bytes, digest, launches
        per call and kernels).

    Raises:
        ValueError: none of this backend's, of another format version, or damaged (the digest of
            every blob is checked).
    """
    methods = {}
    for plan in file.program.execution_plan:
        if not plan.delegates:
            continue
        backend = plan.delegates[0].id
        if backend != EtMoeCudaBackend.__name__:
            raise ValueError(f"method {plan.name} is for {backend}: not a program for CUDA")
        methods[plan.name] = _describe(plan.name, _processed(file.program, plan.delegates[0]))
        for arch, ranges in methods[plan.name]["code"].items():
            for code in ranges:
                _check_code(f"{plan.name}, {arch}, up to {code['longest']}", file, code)
    if not methods:
        raise ValueError("no method is delegated: not a program for CUDA")
    return {
        "backend": EtMoeCudaBackend.__name__,
        "bytes": size,
        "constants": constants_of(file),
        "methods": methods,
    }


def _processed(program: Program, delegate) -> bytes:
    if delegate.processed.location != DataLocation.INLINE:
        raise ValueError("the delegate's data is not in the program")
    return bytes(program.backend_delegate_data[delegate.processed.index].data)


def _describe(method: str, processed: bytes) -> dict[str, object]:
    try:
        description = json.loads(processed)
        found = description["format"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"method {method}: the delegate's description is damaged") from None
    if found != FORMAT:
        raise ValueError(f"method {method} is of format {found}, expected {FORMAT}")
    return description


def _check_code(name: str, file: PTEFile, code: dict) -> None:
    """Raises ValueError unless host program and kernels of a range are those that are described."""
    entries = file.named_data.pte_data if file.named_data else {}
    blobs = {code["data"]: code["sha256"]} | {k["sha256"]: k["sha256"] for k in code["kernels"]}
    for blob, digest in blobs.items():
        if blob not in entries:
            raise ValueError(f"{name}: no blob {blob} in the file")
        content = bytes(file.named_data.buffers[entries[blob].buffer_index])
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{name}: the code is damaged: its digest does not match")


def print_tables(description: dict) -> None:
    """Prints what `describe` returns for people: code, kernels, tensors, constants."""
    console = Console()
    methods = description["methods"]
    versions = ", ".join(f"{k} {v}" for k, v in next(iter(methods.values()))["versions"].items())
    console.print(f"{description['backend']}, {description['bytes']:,} bytes, made with {versions}")
    code = Table("method", "arch", "up to", "launches", "bytes", "sha256", title="code")
    kernels: list[Table] = []
    for name, method in methods.items():
        for arch, ranges in method["code"].items():
            for entry in ranges:
                longest, launches = str(entry["longest"]), str(entry["launches"])
                size, digest = f"{entry['bytes']:,}", entry["sha256"][:16]
                code.add_row(name, arch, longest, launches, size, digest)
                kernels.append(_kernel_table(entry))
    for table in (code, *kernels):
        console.print(table)
    print_methods(console, methods)
    print_constants(console, description["constants"])


def _kernel_table(code: dict) -> Table:
    """The kernels of a method's code for one architecture and range."""
    table = Table("kernel", "launches", "warps", "shared memory", title=code["data"])
    for kernel in code["kernels"]:
        numbers = (str(kernel[key]) for key in ("launches", "num_warps", "shared_memory"))
        table.add_row(kernel["name"], *numbers)
    return table
