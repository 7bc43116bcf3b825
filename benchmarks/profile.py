"""Which kernels a prefill and a decoded token consist of, traced in a run of the runner.

CUPTI reports each kernel's start and end, those of a CUDA graph's nodes too, to a small library
(`cupti_trace.cpp`) that the CUDA driver loads into the runner: no rights and no tool are needed but
g++, the CUDA headers and CUPTI (the `nvidia-cuda-cupti` wheel, which torch for CUDA brings, or a
CUDA toolkit). Tracing widens the gaps between kernels; their own times are right.
"""

import collections
import dataclasses
import importlib.util
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("cupti_trace.cpp")
DECODE_CALLS = 4
"""Decoded tokens of a traced run: enough to tell the period of a token from that of a layer."""


class ProfileError(RuntimeError):
    """Why there is no profile."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel that ran, with times in nanoseconds."""

    start: int
    end: int
    name: str


def _cuda_folders() -> list[Path]:
    """Folders of CUDA headers and libraries: the pip packages', then the toolkit's."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) / "cu13" for p in spec.submodule_search_locations or []] if spec else []
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [*roots, toolkit, toolkit / "extras/CUPTI"]
    return [folder for folder in folders if folder.is_dir()]


def build_tracer(output: Path) -> Path:
    """Compiles the library to `output`.

    Raises:
        ProfileError: no CUPTI, or the compiler fails.
    """
    folders = _cuda_folders()
    libraries = [
        lib for f in folders for d in ("lib", "lib64") for lib in (f / d).glob("libcupti.so*")
    ]
    if not libraries or not any((f / "include/cupti.h").is_file() for f in folders):
        raise ProfileError("CUPTI not found: install nvidia-cuda-cupti, or set CUDA_HOME")
    includes = [f"-isystem{folder / 'include'}" for folder in folders]
    library = libraries[0].resolve()
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *includes]
    command += [str(SOURCE), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ProfileError("g++ not found: it builds the tracer") from None
    if done.returncode:
        raise ProfileError(f"the tracer does not compile: {done.stderr[-2000:]}")
    return output


def trace(command: Sequence[str | Path], folder: Path) -> list[Launch]:
    """Runs a command and returns its kernels in the order of their start.

    Raises:
        ProfileError: the tracer cannot be built, the command fails, or its trace is incomplete.
    """
    output = folder / "kernels.tsv"
    environment = {
        "CUDA_INJECTION64_PATH": str(build_tracer(folder / "cupti_trace.so")),
        "ET_MOE_KERNEL_TRACE": str(output),
    }
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise ProfileError(f"the traced run failed: {done.stderr[-2000:]}")
    if not output.is_file():
        raise ProfileError(f"the driver did not load the tracer: {done.stderr[-2000:]}")
    return parse_trace(output.read_text())


def parse_trace(text: str) -> list[Launch]:
    """Reads what the tracer wrote."""
    lines = text.splitlines()
    if not lines or not lines[-1].startswith("end\t"):
        raise ProfileError("the trace is cut off")
    dropped = int(lines.pop().split("\t")[1])
    if dropped:
        raise ProfileError(f"CUPTI dropped {dropped} kernels")
    fields = (line.split("\t", 2) for line in lines)
    launches = [Launch(int(start), int(end), name) for start, end, name in fields]
    return sorted(launches, key=lambda launch: launch.start)


def last_calls(launches: list[Launch], decoded: int) -> tuple[list[Launch], list[Launch]]:
    """The kernels of the last prefill and of the last of the `decoded` calls after it.

    A decoded token is the shortest sequence of kernels that the trace ends with several times; the
    prefill is what ran between the last tokens and those of the iteration before.

    Raises:
        ProfileError: the trace does not end with `decoded` equal calls, or holds one iteration.
    """
    names = [launch.name for launch in launches]
    for size in range(1, len(names) // decoded + 1):
        call = names[-size:]
        first = len(names) - decoded * size
        if all(names[i : i + size] == call for i in range(first, len(names), size)):
            break
    else:
        raise ProfileError(f"the trace does not end with {decoded} equal decode calls")
    before = first
    while before >= size and names[before - size : before] != call:
        before -= 1
    if before < size or before == first:
        raise ProfileError("the trace holds no prefill between two runs of decode")
    return launches[before:first], launches[-size:]


def batched_call(launches: list[Launch]) -> list[Launch]:
    """The kernels of a decode call of all sequences: the second one behind the last prefill.

    A decode call, with drafts or without, ends with the kernel that hands its tokens over; what
    begins it may come in its middle once more. A prefill hands nothing over.

    Raises:
        ProfileError: two equal calls do not follow the one behind the last prefill.
    """
    calls: list[list[Launch]] = [[]]
    for launch in launches:
        calls[-1].append(launch)
        if "hand_over" in launch.name:
            calls.append([])
    calls.pop()  # behind the last decode call
    names = [[launch.name for launch in call] for call in calls]
    # Those of a prefill stand in front of the kernels of the decode call behind it.
    prompts = ("_scan_kernel", "_few_tokens_kernel")
    prefills = [i for i, call in enumerate(names) if any(n.endswith(prompts) for n in call)]
    last = prefills[-1] if prefills else len(names)
    if len(names) < last + 3 or names[last + 1] != names[last + 2]:
        raise ProfileError("the trace does not hold three decode calls behind a prefill, two equal")
    return calls[last + 1]


def summarize(launches: list[Launch]) -> dict:
    """Microseconds of each kernel name, the slowest first.

    A kernel may start before its predecessor ends, and then waits for it. Its time is what it adds:
    from the end of all before it, or its own start if that is later, to its own end.
    """
    times: dict[str, list[float]] = collections.defaultdict(list)
    ended = 0
    for launch in launches:
        times[launch.name].append(max(launch.end - max(launch.start, ended), 0) / 1e3)
        ended = max(ended, launch.end)
    total = sum(map(sum, times.values()))
    kernels = [
        {"name": name, "launches": len(t), "us": sum(t), "share": sum(t) / total}
        for name, t in times.items()
    ]
    return {
        "launches": len(launches),
        "kernels_us": total,
        "span_us": (launches[-1].end - launches[0].start) / 1e3,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
    }


def profile_batch(command: Sequence[str | Path], folder: Path) -> dict:
    """Profile of a decode call of a runner command that decodes several sequences, as of
    `summarize`, or why there is none in `error`."""
    try:
        return summarize(batched_call(trace(command, folder)))
    except ProfileError as e:
        return {"error": str(e)}


def profile(command: Sequence[str | Path], folder: Path) -> dict:
    """Profile of a runner command that generates `DECODE_CALLS` + 1 tokens at least twice.

    Returns:
        `prefill` and `decode` as of `summarize`, or None for both and the reason in `error`.
    """
    try:
        prefill, decode = last_calls(trace(command, folder), DECODE_CALLS)
    except ProfileError as e:
        return {"prefill": None, "decode": None, "error": str(e)}
    return {"prefill": summarize(prefill), "decode": summarize(decode)}
