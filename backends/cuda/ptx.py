"""What a compiled kernel reads and writes, told from its PTX."""

import collections
import re
from collections.abc import Iterable, Sequence

WAIT = "griddepcontrol.wait"
"""What `triton.dependent_launch.wait_for_previous` becomes."""

_START_NEXT = "griddepcontrol.launch_dependents"

_LOAD = re.compile(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s.*\[ ?(%rd\d+)")
_COPY = re.compile(r"cp\.async\.c[ag]\.\S+ \[.*?\], \[ ?(%rd\d+).*?\], 0x(\w+)")
_STORE = re.compile(r"(?:st\.global|red\.|atom\.)[^\[]*\[ ?(%rd\d+)")
_PARAMETER = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\S*_param_(\d+)\]")
_ACCESS = re.compile(
    r"^(?!tcgen05\.).*\b(?:(?:ld|st|red|atom)\.(?!\S*(?:shared|param|local|const))"
    r"|cp\.(?!async\.(?:commit_group|wait_group|wait_all|bulk\.prefetch)))"
)
"""Whatever else reaches global memory; a prefetch delivers nothing that could be out of date, and
`tcgen05` reaches tensor and shared memory."""
_ASSIGNMENT = re.compile(r"[a-z]\S*\s+(%rd\d+), (.*);")


class _Kernel:
    """Follows 64-bit registers from an address back to the kernel's parameters.

    Raises:
        ValueError: an access is of a form that is not known here, or an address (when asked for)
            comes from no parameter: what it touches cannot be told.
    """

    def __init__(self, ptx: str, parameters: Sequence[str]) -> None:
        self._sources: dict[str, set[str]] = collections.defaultdict(set)
        self._origin: dict[str, str] = {}
        self.loads: list[tuple[str, int]] = []
        self.stores: list[str] = []
        for line in ptx.splitlines():
            line = re.sub(r"^\s*@!?%p\d+\s+", "", line.strip())
            if match := _PARAMETER.match(line):
                if int(match[2]) < len(parameters):
                    self._origin[match[1]] = parameters[int(match[2])]
            elif match := _LOAD.match(line):
                self.loads.append((match[3], int(match[1] or 1) * int(match[2]) // 8))
            elif match := _COPY.match(line):
                self.loads.append((match[1], int(match[2], 16)))
            elif match := _STORE.match(line):
                self.stores.append(match[1])
            elif _ACCESS.search(line):
                raise ValueError(f"unknown access to memory: {line}")
            elif match := _ASSIGNMENT.match(line):
                self._sources[match[1]] |= set(re.findall(r"%rd\d+", match[2]))

    def parameters(self, register: str) -> Iterable[str]:
        seen, todo = set(), [register]
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo.extend(self._sources[current])
        found = {self._origin[r] for r in seen if r in self._origin}
        if not found:
            raise ValueError(f"the address in {register} comes from no parameter")
        return found


def load_widths(ptx: str, parameters: Sequence[str]) -> dict[str, set[int]]:
    """Pointer parameter -> bytes per thread of the global loads whose address derives from it.

    Args:
        parameters: names of the kernel's parameters, in order.
    """
    kernel, widths = _Kernel(ptx, parameters), collections.defaultdict(set)
    for register, width in kernel.loads:
        for parameter in kernel.parameters(register):
            widths[parameter].add(width)
    return widths


def written(ptx: str, parameters: Sequence[str]) -> set[str]:
    """Pointer parameters that the kernel stores through."""
    kernel = _Kernel(ptx, parameters)
    return {parameter for register in kernel.stores for parameter in kernel.parameters(register)}


def read_early(ptx: str, parameters: Sequence[str]) -> set[str] | None:
    """Pointer parameters that the kernel reads before it waits for the one before it.

    Returns:
        None for a kernel that does not wait.

    Raises:
        ValueError: it writes before it waits, or what it accesses cannot be told.
    """
    before, wait, _ = ptx.partition(WAIT)
    if not wait:
        return None
    if stored := written(before, parameters):
        raise ValueError(f"{sorted(stored)} are written before the kernel before has ended")
    return set(load_widths(before, parameters))


def starts_next_early(ptx: str) -> bool:
    """Whether the kernel lets the next one start before it has waited for the one before it."""
    return _START_NEXT in ptx.partition(WAIT)[0]
