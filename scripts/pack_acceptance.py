"""Makes the folder that `gpu_acceptance.sh` takes; `pack_acceptance.sh` calls it.

bin/        the runner, stripped; it finds its libraries in ../lib
lib/        ExecuTorch's libraries and libcudart
wheels/     Python packages that a machine with torch, triton and transformers may lack
models/     CUDA programs, and logits of the CPU programs of the same weights
manifest.json   versions, the commit and its files, and for each model prompts and the tokens that
                the CPU program gives
"""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from acceptance_models import EXPECTED_LOGITS, MANIFEST, TOLERANCES, Case, Model, Program, make_case
from acceptance_session import REPO
from acceptance_tokens import NEW_TOKENS as COMPARED
from acceptance_tokens import OWN, SHARED
from rich.console import Console
from tokenizers import Tokenizer

from et_moe.backends.atomic_file import write_file
from et_moe.backends.cuda.gpu import gpu_for
from et_moe.benchmarks.result import commit, committed_files
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.make_checkpoint import make_checkpoint

DEMO = REPO / "examples/qwen3_5_moe/demo_checkpoint"
PYTHON = "3.12"
"""Of the GPU machine: some of the wheels are for this version alone."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PACKAGES = ("flatbuffers", "pytest", "pytest-timeout", "pytest-xdist", "rich", "typer", "xxhash")
NEW_TOKENS = 32
SCORED = 256
WINDOWS = 32
"""Prompts of one length that are tried at most."""
ENOUGH = {"float32": 16, "bfloat16": 4}
"""Tokens before a near tie that make further prompts needless."""
MODELS = {
    "tiny": ("float32", (1, 2, 65, 300, 2100)),  # the last one needs two calls of prefill
    "demo-float32": ("float32", (1, 17, 130, 700)),
    "demo-bfloat16": ("bfloat16", (1, 17, 130, 700)),
    "demo-drafts": ("bfloat16", (17, 700)),
    "demo-int8": ("bfloat16", (1, 17, 700)),
    "demo-dense": ("bfloat16", (1, 17, 700)),
    # Random, hence full of near ties: only logits are compared with the CPU's.
    "heads": ("bfloat16", ()),
    "heads-drafts": ("bfloat16", ()),
}
"""Name -> dtype, and lengths of the prompts whose next tokens are checked."""
STORED = {
    "demo-int8": ("--qlinear", "8w", "--qembedding", "4w"),
    "demo-dense": ("--recipe", "dense", "--recurrent-state-dtype", "bfloat16"),
}
"""Name -> how it and its state are stored, if not with `--recipe 4w` and in float32."""
DRAFTING = {"demo-drafts": 2, "heads-drafts": 1}
"""Name -> drafts of a step."""
SCORING = ("demo-float32", "heads-drafts")
"""Those with the method `score`, which their logits come from; those of others from `decode`."""
SAME_TOKENS = (
    {"model": "demo-bfloat16", "drafting": "demo-drafts", "accepts": True},
    # Its rows are long enough for the kernels of the 35B's decode. Its head guesses at random.
    {"model": "heads", "drafting": "heads-drafts", "accepts": False},
)
"""Programs of the same weights whose tokens are compared with each other, and whether drafts must
be accepted."""
HEADS = {
    "hidden_size": 256,
    "head_dim": 256,
    "num_experts_per_tok": 8,  # all of them, so that bf16 and fp32 choose the same
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
"""The heads of Qwen3.5-35B-A3B in a small model: kernels are specialised for their sizes."""
console = Console(stderr=True)


def run(command: Sequence[str | Path]) -> str:
    """The standard output of a command.

    Raises:
        RuntimeError: the command fails; the message has the end of its standard error.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        name = Path(command[0]).name
        raise RuntimeError(f"{name}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def et_moe(*arguments: str | Path) -> None:
    """Runs the command line in a process of its own."""
    run([sys.executable, "-m", "et_moe.pipeline.cli", *arguments])


def requirements(pyproject: str) -> list[str]:
    """The requirements of pyproject.toml for `PACKAGES`, in their order."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["export"], *extras["dev"]]
    by_name = {re.match(r"[\w.-]+", line).group(): line for line in lines}
    return [by_name[name] for name in PACKAGES]


def pack_wheels(folder: Path) -> None:
    """Downloads `PACKAGES` and what they need."""
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON),
            *(*platforms, "--dest", folder),
            *requirements((REPO / "pyproject.toml").read_text()),
        ]
    )


def libraries(binary: Path) -> dict[str, Path | None]:
    """The shared libraries that a binary loads, and where they are found."""
    lines = re.findall(r"^\s*(\S+) => (?:(/\S+)|not found)", run(["ldd", binary]), re.MULTILINE)
    return {name: Path(path) if path else None for name, path in lines}


def pack_runner(runner: Path, folder: Path) -> Path:
    """Copies the runner and the libraries that are no part of the system.

    Raises:
        RuntimeError: the copy does not find them beside itself, or does not start.
    """
    (folder / "bin").mkdir()
    (folder / "lib").mkdir()
    binary = folder / "bin" / runner.name
    run(["strip", "-o", binary, runner])
    system = (Path("/lib"), Path("/lib64"), Path("/usr"))
    for name, path in libraries(runner).items():
        if path is None:
            raise RuntimeError(f"{runner}: {name} is not found")
        if not any(path.is_relative_to(s) for s in system):
            shutil.copy(path, folder / "lib" / name)
    for name, path in libraries(binary).items():
        inside = path is not None and path.resolve().is_relative_to(folder.resolve())
        if (folder / "lib" / name).exists() and not inside:
            raise RuntimeError(f"{binary}: {name} comes from {path}, expected from ../lib")
    run([binary, "--help"])
    return binary


def prompts(model: str, length: int) -> list[list[int]]:
    """Token ids to choose a prompt from: held-out text for the demo model, else random ids."""
    if not model.startswith("demo"):
        rng = np.random.default_rng(length)
        return rng.integers(0, 256, (WINDOWS, length)).tolist()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode((DEMO / "heldout.txt").read_text()).ids
    starts = np.linspace(0, len(ids) - length, WINDOWS, dtype=int)
    return [ids[start : start + length] for start in starts]


def choose_case(program: Program, model: str, dtype: str, length: int) -> Case:
    """The prompt with the most tokens before a near tie.

    Raises:
        RuntimeError: a near tie follows every prompt at once.
    """
    best = None
    for prompt in prompts(model, length):
        case = make_case(program, prompt, NEW_TOKENS, TOLERANCES[dtype].margin)
        if best is None or len(case.expected_ids) > len(best.expected_ids):
            best = case
        if len(best.expected_ids) >= ENOUGH[dtype]:
            break
    if not best.expected_ids:
        raise RuntimeError(f"{model}: {length} tokens: each prompt tried is followed by a near tie")
    return best


def pack_model(name: str, checkpoint: Path, runner: Path, archs: list[str], folder: Path) -> Model:
    """Exports the CUDA program, and asks the fp32 CPU program what it must compute."""
    dtype, lengths = MODELS[name]
    stored = STORED.get(name, ("--recipe", "4w"))
    model = ("--model-dir", checkpoint, *stored, "--qlinear-group-size", "32")
    context = max((SCORED, *lengths)) + NEW_TOKENS
    if any(name in (entry["model"], entry["drafting"]) for entry in SAME_TOKENS):
        context = max(context, SHARED + OWN + COMPARED + WINDOWS)
    model += ("--max-seq-len", str(context))
    with tempfile.TemporaryDirectory() as scratch:
        cpu = Path(scratch, "cpu")
        et_moe("export", *model, "--dtype", "float32", "--output-dir", cpu)
        program = Program(run, runner, cpu, Path(scratch))
        cases = [choose_case(program, name, dtype, length) for length in lengths]
        scored = prompts(name, SCORED)[0]
        folder.mkdir(parents=True)
        np.save(folder / EXPECTED_LOGITS, program.logits(scored))
    target = ("--backend", "cuda", "--cuda-arch", ",".join(archs), "--dtype", dtype)
    target += ("--draft-tokens", str(DRAFTING.get(name, 0)))
    target += ("--score",) if name in SCORING else ()
    et_moe("export", *model, *target, "--output-dir", folder)
    return Model(name, dtype, cases, scored)


def same_tokens(model: str, **entry: object) -> dict:
    """What the manifest says of an entry of `SAME_TOKENS`."""
    given = {"prompts": prompts(model, OWN)[::2], "shared": prompts(model, SHARED)[0]}
    return {"model": model, **entry, **given}


def pack(folder: Path, runner: Path, archs: list[str]) -> None:
    """Fills `folder`, which is empty."""
    binary = pack_runner(runner, folder)
    console.print("runner packed")
    pack_wheels(folder / "wheels")
    console.print("wheels packed")
    models = []
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch, "tiny"), MODEL, seed=1)
        with_head = HEADS | {"mtp_num_hidden_layers": 1}
        make_checkpoint(Path(scratch, "heads"), MODEL, seed=1, overrides=with_head)
        for name in MODELS:
            kind = name.partition("-")[0]
            checkpoint = DEMO if kind == "demo" else Path(scratch, kind)
            models.append(pack_model(name, checkpoint, binary, archs, folder / "models" / name))
            console.print(f"{name} packed")
    manifest = {
        **commit(),
        "python": PYTHON,
        "machine": platform.machine(),
        "archs": archs,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "triton", "executorch")},
        "models": [model.to_json() for model in models],
        "same_tokens": [same_tokens(**entry) for entry in SAME_TOKENS],
        "files": committed_files(),
    }
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def main(
    folder: Annotated[Path, typer.Argument(help="Made anew.")],
    cuda_arch: Annotated[str, typer.Option(help="Such as sm_90,sm_80.")] = "sm_90",
    runner: Annotated[Path, typer.Option(help="The runner's binary.")] = (
        REPO / "build/runner/qwen3_5_moe_runner"
    ),
) -> None:
    """Packs everything that the acceptance run on a GPU needs."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise typer.BadParameter(f"{folder} holds other files")
    archs = [gpu_for(arch.strip()).arch for arch in cuda_arch.split(",")]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        pack(new, runner, archs)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"wrote {folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
