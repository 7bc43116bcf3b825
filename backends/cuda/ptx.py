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
_ASSIGNMENT = re.compile(r"([a-z]\S*)\s+(\{[^}]*\}|%rd\d+), (.*);")
_POINTER = re.compile(r"%rd\d+")


class _Kernel:
    """Follows 64-bit registers from an address back to the kernel's parameters.

    Raises:
        ValueError: an access to memory is of a form that is not known here.
    """

    def __init__(self, ptx: str, parameters: Sequence[str]) -> None:
        self._sources: dict[str, set[str]] = collections.defaultdict(set)
        self._origin: dict[str, str] = {}
        self._lost: set[str] = set()
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
                self._assign(*match.groups())

    def _assign(self, operation: str, targets: str, sources: str) -> None:
        # Out of shared memory, or put together from halves, comes what another thread may have had.
        lost = operation.startswith("ld.") or "{" in sources
        for target in _POINTER.findall(targets):
            self._sources[target].update(_POINTER.findall(sources))
            if lost:
                self._lost.add(target)

    def parameters(self, register: str) -> set[str] | None:
        """Those that an address comes from; None where that cannot be told."""
        seen, todo = set(), [register]
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo.extend(self._sources[current])
        found = {self._origin[r] for r in seen if r in self._origin}
        return None if seen & self._lost or not found else found

    def touched(self, registers: Iterable[str]) -> set[str]:
        """Parameters that addresses may come from: where that cannot be told, all pointers."""
        touched = set()
        for register in registers:
            found = self.parameters(register)
            touched |= set(self._origin.values()) if found is None else found
        return touched


def load_widths(ptx: str, parameters: Sequence[str]) -> dict[str, set[int]]:
    """Pointer parameter -> bytes per thread of the global loads whose address derives from it.

    Args:
        parameters: names of the kernel's parameters, in order.
    """
    kernel, widths = _Kernel(ptx, parameters), collections.defaultdict(set)
    for register, width in kernel.loads:
        for parameter in kernel.parameters(register) or ():
            widths[parameter].add(width)
    return widths


def written(ptx: str, parameters: Sequence[str]) -> set[str]:
    """Pointer parameters that the kernel may store through."""
    kernel = _Kernel(ptx, parameters)
    return kernel.touched(kernel.stores)


def read_early(ptx: str, parameters: Sequence[str]) -> set[str] | None:
    """Pointer parameters that the kernel may read before it waits for the one before it.

    Returns:
        None for a kernel that does not wait.

    Raises:
        ValueError: it writes before it waits, or accesses memory in a way that is not known here.
    """
    before, wait, _ = ptx.partition(WAIT)
    if not wait:
        return None
    # Registers are followed through the whole kernel: a loop may assign one further down.
    early, whole = _Kernel(before, parameters), _Kernel(ptx, parameters)
    if early.stores:
        raise ValueError(
            f"{sorted(whole.touched(early.stores))} are written before the kernel before has ended"
        )
    return whole.touched(register for register, _ in early.loads)


def starts_next_early(ptx: str) -> bool:
    """Whether the kernel lets the next one start before it has waited for the one before it."""
    return _START_NEXT in ptx.partition(WAIT)[0]
