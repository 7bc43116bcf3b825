"""Which kernels there are to compile: what the ops launch, in every tuned configuration, for all
GPU architectures.

The ops themselves are called, on meta tensors, see
`et_moe.backends.cuda.triton.cases.op_case`; so what is compiled is what an exported program
launches.
"""

import collections
import dataclasses

import torch

from et_moe.backends.cuda.gpu import ARCHS, GPUS
from et_moe.backends.cuda.triton import tuning
from et_moe.backends.cuda.triton.cases.launches import Launch, record_launches
from et_moe.backends.cuda.triton.cases.lookups import record_lookups
from et_moe.backends.cuda.triton.cases.op_case import PREFILL_TOKENS, OpCase

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A kernel to compile for one architecture: what Triton's compiler is given.

    Attributes:
        module: where the kernel's function is; kernel: its name.
        signature: parameter -> type, such as "*bf16", "i32" or "constexpr".
        constexprs: parameter -> value.
        divisible: positions of the parameters that are multiples of 16.
        options: of the launch, such as `num_warps`.
    """

    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def configuration(self) -> str:
        """Block sizes and options of the launch, for people."""
        sizes = [f"{name}={value}" for name, value in self.constexprs if name.isupper()]
        return " ".join(sizes + [f"{name}={value}" for name, value in self.options])


@dataclasses.dataclass
class Demands:
    """The cases that launch a job's kernel, and what its machine code must be like.

    Attributes:
        tensor_cores: whether it must have INT8 tensor-core instructions.
        wgmma: whether these must be Hopper's own, on sm_90.
        streams: pointer parameters that must be read 16 bytes at a time.
    """

    cases: set[str] = dataclasses.field(default_factory=set)
    tensor_cores: bool = False
    wgmma: bool = False
    streams: set[str] = dataclasses.field(default_factory=set)


def job_of(launch: Launch, arch: str) -> Job:
    """What Triton would compile for a launch whose tensors are aligned to 16 bytes."""
    signature, constexprs, divisible = [], [], []
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments.get(name, parameter.default if parameter.has_default else None)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            kind = "constexpr"
            constexprs.append((name, getattr(value, "value", value)))
        elif isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            divisible.append(i)
        elif isinstance(value, bool):
            kind = "i1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(i)
        else:
            kind = "fp32"
        signature.append((name, kind))
    function = launch.kernel.fn
    return Job(
        function.__module__,
        function.__name__,
        arch,
        tuple(signature),
        tuple(constexprs),
        tuple(divisible),
        tuple(sorted(launch.options.items())),
    )


def targets() -> list[tuple[str, ...]]:
    """For each architecture and each GPU the names by which configurations are looked up.

    The last name is the architecture.
    """
    named = [(gpu.name, gpu.arch) for gpu in GPUS]
    return [*((arch,) for arch in ARCHS), *named]


def collect(cases: list[OpCase]) -> tuple[dict[Job, Demands], set[tuple[str, str, int]]]:
    """All different jobs of the cases, and the tuning entries (table, GPU, index) looked up."""
    jobs: dict[Job, Demands] = collections.defaultdict(Demands)
    reached = set()
    for case in cases:
        for names in targets():
            with tuning.tuning_target(*names), record_lookups() as lookups:
                for m in sorted(_tokens(case)):
                    with record_launches() as launches:
                        case.op(**case.arguments(m, torch.device("meta")))
                    for launch in launches:
                        _demand(jobs[job_of(launch, names[-1])], case, launch.name, m)
            reached |= {(lookup.table, lookup.gpu, lookup.index) for lookup in lookups}
    return dict(jobs), reached


def _tokens(case: OpCase) -> set[int]:
    """The case's numbers of tokens, and one for each entry of its tables, odd where possible: no
    divisibility must be relied on."""
    tokens = set(case.tokens)
    tables = [tuning.read_table(name) for name in case.tables] if len(tokens) > 1 else []
    for table in (table for table in tables if table.key == "tokens"):
        below = 0
        for entry in table.entries[tuning.find_gpu(table)]:
            bound = entry.bound or PREFILL_TOKENS
            tokens.add(bound - 1 if bound % 2 == 0 and bound - 1 > below else bound)
            below = bound
    return tokens


def _demand(demands: Demands, case: OpCase, kernel: str, m: int) -> None:
    demands.cases.add(case.name)
    demands.streams |= set(case.streams.get(kernel, ()))
    if kernel in case.gemms:
        demands.tensor_cores = True
        demands.wgmma |= m == PREFILL_TOKENS


def all_entries() -> set[tuple[str, str, int]]:
    """Every entry of every tuning table."""
    return {
        (path.stem, gpu, index)
        for path in tuning.FOLDER.glob("*.json")
        for gpu, entries in tuning.read_table(path.stem).entries.items()
        for index in range(len(entries))
    }
