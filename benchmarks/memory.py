"""Peak resident memory and CPU time of quantizing and exporting checkpoints of the published width.

A small form of this, for any layer width, is part of the tests (tests/pipeline/measure_memory.py).
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from et_moe.benchmarks.gptq_layout import write_official

LIMIT = 8e9
"""Bytes that no command may exceed."""
GROWTH = 0.3e9
"""Bytes by which the peaks for two numbers of layers may differ, a fifth of a layer in bf16."""


OPEN = """
import sys, time
from pathlib import Path
from et_moe.pipeline.checkpoint import Checkpoint
begin, cpu = time.monotonic(), time.process_time()
Checkpoint(Path(sys.argv[1]))
took, cpu = time.monotonic() - begin, time.process_time() - cpu
print(f"open: {took:.1f} s, {cpu:.1f} s of CPU time", flush=True)
"""
"""Program that opens a checkpoint, and prints how long it took without the imports."""


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        peak: bytes of its largest resident set.
        cpu: seconds of CPU time, of all its threads.
    """

    peak: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.peak / 1e9:.2f} GB, {self.cpu:.0f} s of CPU time"


def run(*command: object) -> Usage:
    """What a command takes."""
    process = subprocess.Popen([*map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{' '.join(map(str, command[:2]))} failed")
    return Usage(usage.ru_maxrss * 1024.0, usage.ru_utime + usage.ru_stime)


def et_moe(*arguments: object) -> Usage:
    """What `et-moe ARGUMENTS` takes."""
    return run(sys.executable, "-m", "et_moe.pipeline.cli", *arguments)


def measure(folder: Path, layers: list[int]) -> bool:
    """Measures every command for every number of layers, and prints a line each.

    Returns:
        Whether none takes more than `LIMIT`, or grows with the number of layers.
    """
    peaks: dict[str, list[float]] = {"make-checkpoint": [], "quantize": [], "export": []}
    for count in layers:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            checkpoint, bundle, program = (Path(place, n) for n in ("checkpoint", "bundle", "out"))
            made = ("--preset", "35b", "--layers", count, "--output-dir", checkpoint)
            commands = [
                ("make-checkpoint", *made),
                ("quantize", "--model-dir", checkpoint, "--output-dir", bundle),
                ("export", "--prequantized", bundle, "--output-dir", program),
            ]
            for command in commands:
                usage = et_moe(*command)
                peaks[command[0]].append(usage.peak)
                print(f"{count} layers, {command[0]}: {usage}", flush=True)
    too_large = max(max(values) for values in peaks.values()) > LIMIT
    grows = any(max(values) - min(values) > GROWTH for values in peaks.values())
    return not (too_large or grows)


def measure_gptq(folder: Path, layers: list[int]) -> bool:
    """Measures opening a checkpoint in the layout of the official GPTQ one, with all its tensors,
    and quantizing such a checkpoint with fewer layers; prints a line each.

    Returns:
        Whether neither takes more than `LIMIT`, nor quantizing grows with the number of layers.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        tensors = write_official(Path(place, "checkpoint"))
        print(f"{tensors} tensors, ", end="", flush=True)
        peaks = [run(sys.executable, "-c", OPEN, Path(place, "checkpoint"))]
        print(f"{tensors} tensors, open: {peaks[0]} with imports", flush=True)
    for count in layers:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            checkpoint, bundle = Path(place, "checkpoint"), Path(place, "bundle")
            write_official(checkpoint, count)
            usage = et_moe("quantize", "--model-dir", checkpoint, "--output-dir", bundle)
            peaks.append(usage)
            print(f"{count} layers and the MTP head, quantize: {usage}", flush=True)
    quantized = [usage.peak for usage in peaks[1:]]
    return max(u.peak for u in peaks) <= LIMIT and max(quantized) - min(quantized) <= GROWTH
