"""Peak resident memory of quantizing and exporting a checkpoint of the published width.

A small form of this, for any layer width, is part of the tests (tests/pipeline/measure_memory.py).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 8e9
"""Bytes that no command may exceed."""
GROWTH = 0.3e9
"""Bytes by which the peaks for two numbers of layers may differ, a fifth of a layer in bf16."""


def peak(*arguments: object) -> float:
    """The largest resident set of `et-moe ARGUMENTS`, in bytes."""
    process = subprocess.Popen([Path(sys.executable).with_name("et-moe"), *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"et-moe {arguments[0]} failed")
    return usage.ru_maxrss * 1024.0


def measure(folder: Path, layers: list[int]) -> bool:
    """Measures every command for every number of layers, and prints a line each.

    Returns:
        Whether none takes more than `LIMIT`, or grows with the number of layers.
    """
    peaks: dict[str, list[float]] = {"make-checkpoint": [], "quantize": [], "export": []}
    for count in layers:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            checkpoint, bundle, program = (Path(place, n) for n in ("checkpoint", "bundle", "out"))
            commands = [
                (
                    "make-checkpoint",
                    "--preset",
                    "35b",
                    "--layers",
                    count,
                    "--output-dir",
                    checkpoint,
                ),
                ("quantize", "--model-dir", checkpoint, "--output-dir", bundle),
                ("export", "--prequantized", bundle, "--output-dir", program),
            ]
            for command in commands:
                peaks[command[0]].append(peak(*command))
                gigabytes = peaks[command[0]][-1] / 1e9
                print(f"{count} layers, {command[0]}: {gigabytes:.2f} GB", flush=True)
    too_large = max(max(values) for values in peaks.values()) > LIMIT
    grows = any(max(values) - min(values) > GROWTH for values in peaks.values())
    return not (too_large or grows)
