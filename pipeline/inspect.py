"""What an exported program holds, whatever it runs on."""

import json

from rich.console import Console

from et_moe.backends.cpu import inspect as cpu
from et_moe.backends.cuda import inspect as cuda
from et_moe.backends.program_file import is_program, open_program
from et_moe.backends.sealed_file import check_sealed
from et_moe.pipeline.footprint import in_words


def inspect(pte: bytes) -> dict[str, object]:
    """Describes a `.pte` as its backend does; all of it can be written as JSON.

    Raises:
        ValueError: not a program that `et-moe export` wrote, one of another version, or damaged.
    """
    if is_program(pte):
        check_sealed(pte)
    file = open_program(pte)
    delegated = any(plan.delegates for plan in file.program.execution_plan)
    return cuda.describe(file, len(pte)) if delegated else cpu.describe(file, len(pte))


def print_description(description: dict, as_json: bool) -> None:
    """Prints what `inspect` returns on standard output."""
    if as_json:
        print(json.dumps(description, indent=1))
        return
    backend = cpu if description["backend"] == "cpu" else cuda
    backend.print_tables(description)
    names = ("get_bits_per_weight", "get_bytes_per_token")
    taken = [description["constants"][n] for n in names if n in description["constants"]]
    if len(taken) == len(names):
        Console().print(in_words(*taken), highlight=False, soft_wrap=True)
