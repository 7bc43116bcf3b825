"""What a CUDA `.pte` holds, without running it."""

import hashlib
import json
import math
import struct

import torch
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from executorch.exir.schema import DataLocation, Program
from rich.console import Console
from rich.table import Table

from et_moe.backends.cuda.backend import FORMAT, EtMoeCudaBackend


def inspect(pte: bytes) -> dict[str, object]:
    """Describes a `.pte` of `lower`; all of it can be written as JSON.

    Returns:
        `backend`: its id; `bytes`: of the file; `constants`: constant method -> value; `methods`:
        method -> what `backend.describe` says of it (inputs, outputs, hand_over, state, weights,
        versions, prepack, and per architecture and range the largest size, bytes, digest, launches
        per call and kernels).

    Raises:
        ValueError: not a `.pte`, none of this backend's, of another format version, or damaged (the
            digest of every blob is checked).
    """
    if pte[4:8] != b"ET12":
        expected = "expected one that `et-moe export` wrote"
        raise ValueError(f"not an ExecuTorch program (.pte), {expected}")
    try:
        file = deserialize_pte_binary(pte)
    except (ValueError, AssertionError, IndexError, KeyError, struct.error) as e:
        raise ValueError(f"not an ExecuTorch program, or damaged: {e}") from None
    methods, constants = {}, {}
    for plan in file.program.execution_plan:
        if not plan.delegates:
            constants[plan.name] = _constant(plan.values[plan.outputs[0]].val)
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
        "bytes": len(pte),
        "constants": constants,
        "methods": methods,
    }


def _constant(value: object) -> object:
    for field in ("int_val", "double_val", "bool_val", "string_val"):
        if hasattr(value, field):
            return getattr(value, field)
    return None


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
    """Prints what `inspect` returns for people: code, kernels, tensors, constants."""
    console = Console()
    methods = description["methods"]
    versions = ", ".join(f"{k} {v}" for k, v in next(iter(methods.values()))["versions"].items())
    console.print(f"{description['backend']}, {description['bytes']:,} bytes, made with {versions}")
    code = Table("method", "arch", "up to", "launches", "bytes", "sha256", title="code")
    calls = Table("method", "kind", "tensor", "dtype", "shape", title="inputs and outputs")
    tensors = Table("method", "tensors", "number", "bytes", title="tensors")
    kernels: list[Table] = []
    for name, method in methods.items():
        for arch, ranges in method["code"].items():
            for entry in ranges:
                longest, launches = str(entry["longest"]), str(entry["launches"])
                size, digest = f"{entry['bytes']:,}", entry["sha256"][:16]
                code.add_row(name, arch, longest, launches, size, digest)
                kernels.append(_kernel_table(entry))
        for kind in ("input", "output"):
            for tensor in method[f"{kind}s"]:
                use = _hand_over_text(method["hand_over"], tensor["name"])
                calls.add_row(name, kind, tensor["name"] + use, tensor["dtype"], _shape(tensor))
        own_pool = method["own_pool"]
        for kind in ("inputs", "state", "weights", "outputs"):
            size = sum(_nbytes(tensor, own_pool) for tensor in method[kind])
            tensors.add_row(name, kind, str(len(method[kind])), f"{size:,}")
    for table in (code, *kernels, calls, tensors, _state_table(next(iter(methods.values())))):
        console.print(table)
    constants = {k: v for k, v in description["constants"].items() if k != "get_bindings"}
    for name, value in constants.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True, markup=False)


def _state_table(method: dict) -> Table:
    """What a page and a slot take."""
    table = Table("pool", "dtype", "tensors", "bytes each", title="state of a page or a slot")
    sizes: dict[tuple[str, str], list[int]] = {}
    for tensor in method["state"]:
        size = _nbytes(tensor, {tensor["pool"]: 1})
        sizes.setdefault((tensor["pool"], tensor["dtype"]), []).append(size)
    for (pool, dtype), each in sorted(sizes.items()):
        table.add_row(pool, dtype, str(len(each)), f"{sum(each):,}")
    return table


def _kernel_table(code: dict) -> Table:
    """The kernels of a method's code for one architecture and range."""
    table = Table("kernel", "launches", "warps", "shared memory", title=code["data"])
    for kernel in code["kernels"]:
        numbers = (str(kernel[key]) for key in ("launches", "num_warps", "shared_memory"))
        table.add_row(kernel["name"], *numbers)
    return table


def _hand_over_text(hand_over: dict | None, name: str) -> str:
    """What the next call takes from this tensor or for it, to be put behind its name."""
    if hand_over is None:
        return ""
    token = hand_over["token"]
    uses = {
        token: " (handed over)",
        hand_over["tokens"]: f" (next: {token})",
        hand_over["positions"]: " (next: + 1)",
    }
    if versions := hand_over.get("versions"):
        uses[hand_over["positions"]] = f" (next: + 1 + {token}[0])"
        uses |= {hand_over["tokens"]: f" (next: {token}[1:])", versions: f" (next: {token}[0])"}
    return uses.get(name, "")


def _shape(tensor: dict) -> str:
    """Such as "[1, 2..2048]": a range where a dimension varies from call to call."""
    high = tensor["shape"]
    sizes = zip(tensor.get("min_shape", high), high, strict=True)
    return f"[{', '.join(str(h) if lo == h else f'{lo}..{h}' for lo, h in sizes)}]"


def _nbytes(tensor: dict, own_pool: dict[str, int]) -> int:
    """Bytes of the largest shape; of state those of one sequence, the longest."""
    count = own_pool.get(tensor.get("pool"), tensor["shape"][0] if tensor["shape"] else 1)
    return count * math.prod(tensor["shape"][1:]) * getattr(torch, tensor["dtype"]).itemsize
