"""Machine code of compiled kernels: where it lies in a cubin, and which instructions it holds."""

import collections
import hashlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import sm_arch_from_capability

INSTRUCTION_BYTES = 16
"""Size of an instruction on every architecture since Volta."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)", re.MULTILINE)
_LINE_NUMBERS = re.compile(r"//.*|^\s*\.(?:loc|file)\b.*|^\$L__(?:tmp|func)\w*:", re.MULTILINE)
TENSOR_CORE_OPCODE = re.compile(r"\w*MMA")
"""Such as IMMA, HMMA, IGMMA (Hopper) and UTCHMMA (Blackwell)."""


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit little-endian ELF file."""
    (headers,) = struct.unpack_from("<Q", elf, 0x28)  # e_shoff
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)  # e_shentsize, e_shnum, e_shstrndx
    # sh_name, then sh_offset and sh_size after type, flags and address
    entries = [struct.unpack_from("<I20xQQ", elf, headers + i * size) for i in range(count)]
    for name, offset, length in entries:
        start = entries[names][1] + name
        yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + length]


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin: the bytes of its `.text` sections."""
    return b"".join(data for name, data in _sections(cubin) if name.startswith(".text."))


def hash_code(code: bytes) -> str:
    """Equal for equal machine code, whatever the kernel is called."""
    return hashlib.sha256(code).hexdigest()[:32]


def hash_ptx(ptx: str, kernel: str) -> str:
    """Equal for PTX that differs in the kernel's name and in line numbers alone.

    ptxas 13.0 does not always make the same machine code of the same PTX: the preparation of the
    gated delta rule comes out in two forms on sm_100.
    """
    instructions, _, _ = ptx.partition("\t.section")
    text = _LINE_NUMBERS.sub("", instructions).replace(kernel, "kernel").split()
    return hashlib.sha256(" ".join(text).encode()).hexdigest()[:32]


def count_opcodes(arch: str, codes: Sequence[bytes]) -> list[collections.Counter]:
    """Machine instructions by opcode ("IMMA", "LDG", ...) of several kernels of one architecture.

    All are disassembled at once, as if they were one: to start nvdisasm takes as long as to
    disassemble 3000 instructions.

    Raises:
        RuntimeError: nvdisasm fails, or does not list every instruction.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    processor = sm_arch_from_capability(int(arch.removeprefix("sm_"))).replace("sm_", "SM")
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [tool, "--binary", processor, "--no-dataflow", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm for {arch}: {done.stderr.strip()[-400:]}")
    listed = [match[1] for match in _INSTRUCTION.finditer(done.stdout)]
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    if len(listed) != sum(counts):
        raise RuntimeError(f"nvdisasm for {arch}: {len(listed)} instructions of {sum(counts)}")
    instructions = iter(listed)
    return [collections.Counter(next(instructions) for _ in range(count)) for count in counts]
