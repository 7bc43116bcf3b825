"""What a `.pte` for the CPU holds, without running it."""

import json
from collections import Counter

from executorch.exir._serialize._program import PTEFile
from executorch.exir.schema import KernelCall
from rich.console import Console
from rich.table import Table

from et_moe.backends.method_graph import PAGES, SLOTS
from et_moe.backends.program_file import (
    constants_of,
    is_constant,
    print_constants,
    print_methods,
)


def describe(file: PTEFile, size: int) -> dict[str, object]:
    """Describes a `.pte` of `lower` with so many bytes; all of it can be written as JSON.

    Returns:
        `backend`: "cpu"; `bytes`: of the file; `constants`: constant method -> value; `methods`:
        method -> inputs, outputs, hand_over, state and weights (`backends/bindings.py`), own_pool
        (how many pages and slots a sequence has at most), scratch (bytes for values between ops)
        and ops (operator -> how often it is called).

    Raises:
        ValueError: none of this backend's.
    """
    constants = constants_of(file)
    if constants.get("get_backend") != json.dumps("cpu"):
        raise ValueError(
            "neither for the CPU nor for CUDA: expected one that `et-moe export` wrote"
        )
    bindings = json.loads(constants["get_bindings"])
    shared = {
        "state": bindings["state"],
        "weights": bindings["weights"],
        "own_pool": {PAGES: constants["get_max_pages"], SLOTS: 1},
    }
    plans = [plan for plan in file.program.execution_plan if not is_constant(plan)]
    return {
        "backend": "cpu",
        "bytes": size,
        "constants": constants,
        "methods": {
            plan.name: {
                **bindings["methods"][plan.name],
                **shared,
                "scratch": sum(plan.non_const_buffer_sizes),
                "ops": _count_ops(plan),
            }
            for plan in plans
        },
    }


def _count_ops(plan) -> dict[str, int]:
    calls = (i.instr_args for chain in plan.chains for i in chain.instructions)
    counts = Counter(call.op_index for call in calls if isinstance(call, KernelCall))
    return {plan.operators[index].name: number for index, number in counts.items()}


def print_tables(description: dict) -> None:
    """Prints what `describe` returns for people: ops, tensors, constants."""
    console = Console()
    console.print(f"{description['backend']}, {description['bytes']:,} bytes")
    ops = Table("method", "op", "calls", title="ops")
    scratch = Table("method", "bytes", title="values between ops")
    for name, method in description["methods"].items():
        for op, calls in method["ops"].items():
            ops.add_row(name, op, str(calls))
        scratch.add_row(name, f"{method['scratch']:,}")
    console.print(ops)
    console.print(scratch)
    print_methods(console, description["methods"])
    print_constants(console, description["constants"])
