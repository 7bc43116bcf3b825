"""What a `.pte` holds, without running it: its methods and constants, and tables of them."""

import math
import struct

import torch
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from rich.console import Console
from rich.table import Table


def is_program(pte: bytes) -> bool:
    """Whether a file begins as ExecuTorch's programs do."""
    return pte[4:8] == b"ET12"


def open_program(pte: bytes) -> PTEFile:
    """The content of a `.pte`.

    Raises:
        ValueError: not a `.pte`, or a damaged one.
    """
    if not is_program(pte):
        expected = "expected one that `et-moe export` wrote"
        raise ValueError(f"not an ExecuTorch program (.pte), {expected}")
    try:
        return deserialize_pte_binary(pte)
    except (ValueError, AssertionError, IndexError, KeyError, struct.error) as e:
        raise ValueError(f"not an ExecuTorch program, or damaged: {e}") from None


def constants_of(file: PTEFile) -> dict[str, object]:
    """Constant method -> its value: those that take nothing and do nothing."""
    plans = file.program.execution_plan
    return {p.name: _constant(p.values[p.outputs[0]].val) for p in plans if is_constant(p)}


def is_constant(plan) -> bool:
    """Whether a method of a program only returns a constant."""
    return not plan.delegates and not any(chain.instructions for chain in plan.chains)


def _constant(value: object) -> object:
    for field in ("int_val", "double_val", "bool_val", "string_val"):
        if hasattr(value, field):
            return getattr(value, field)
    return None


def print_methods(console: Console, methods: dict[str, dict]) -> None:
    """Prints tables of what methods take, return and share.

    Args:
        methods: method -> `inputs`, `outputs`, `state`, `weights` and `hand_over` as
            `backends/bindings.py` describes them, and `own_pool`: pages and slots of a sequence.
    """
    calls = Table("method", "kind", "tensor", "dtype", "shape", title="inputs and outputs")
    tensors = Table("method", "tensors", "number", "bytes", title="tensors")
    for name, method in methods.items():
        for kind in ("input", "output"):
            for tensor in method[f"{kind}s"]:
                use = _hand_over_text(method["hand_over"], tensor["name"])
                calls.add_row(name, kind, tensor["name"] + use, tensor["dtype"], _shape(tensor))
        own_pool = method["own_pool"]
        for kind in ("inputs", "state", "weights", "outputs"):
            size = sum(_nbytes(tensor, own_pool) for tensor in method[kind])
            tensors.add_row(name, kind, str(len(method[kind])), f"{size:,}")
    for table in (calls, tensors, _state_table(next(iter(methods.values())))):
        console.print(table)


def print_constants(console: Console, constants: dict[str, object]) -> None:
    """Prints a line for each constant but the bindings, which the tables show."""
    for name, value in constants.items():
        if name != "get_bindings":
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
