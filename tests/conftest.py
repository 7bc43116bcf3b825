"""Fixtures that every test folder shares."""

import functools
import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._export.utils as torch_export
from files import made_once

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, and for its own functions when it is first
    # imported. Tests that compile kernels do so in a process of their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Tensors are small, and pytest-xdist has a process for every core. Threads of torch, here and
    # in what tests start, would spend most of their time waiting for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# For each exported program torch looks all C++ operators up, once for each of some tens of
# namespaces: most of the time of a small export. Tests define no such operators.
torch_export._materialize_cpp_cia_ops = functools.cache(torch_export._materialize_cpp_cia_ops)

# Without this UBSan prints what it finds, and the program goes on and succeeds.
os.environ.setdefault("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1")

# A test run that was started in the background may ignore signals, and so would what tests start.
for number, usual in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The CMake build folder that holds the runner and the C++ test tools."""
    path = Path(os.environ.get("ET_MOE_BUILD_DIR", REPO / "build"))
    if not path.is_dir():
        pytest.fail(f"{path}: no build found; run scripts/setup.sh or set ET_MOE_BUILD_DIR")
    return path


@dataclass(frozen=True)
class Runner:
    """The runner's binary."""

    binary: Path

    def run(
        self, program: Path, *flags: str, check: bool = True, **options
    ) -> subprocess.CompletedProcess:
        """Runs it on the `model.pte` and `model.ptd` of a directory, with options of
        `subprocess.run`."""
        command = [
            self.binary,
            f"--model_path={program / 'model.pte'}",
            f"--data_path={program / 'model.ptd'}",
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def generate(self, program: Path, prompt: list[int], count: int, *flags: str) -> list[int]:
        """The ids that follow `prompt`."""
        # Programs are shared by tests, so nothing is left in their folders.
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output_ids.json")
            self.run(
                program,
                f"--prompt_ids={','.join(map(str, prompt))}",
                f"--max_new_tokens={count}",
                f"--output_ids_path={output}",
                *flags,
            )
            return json.loads(output.read_text())

    def score(self, program: Path, ids: list[int]) -> list[float]:
        """Teacher-forced log-probabilities of ids[1:]."""
        with tempfile.TemporaryDirectory() as folder:
            ids_path, output = Path(folder, "ids.json"), Path(folder, "logprobs.json")
            ids_path.write_text(json.dumps(ids))
            self.run(program, f"--score_ids_path={ids_path}", f"--logprobs_path={output}")
            return json.loads(output.read_text())

    def logits(self, program: Path, ids: list[int]) -> torch.Tensor:
        """Teacher-forced logits that predict ids[1:], float32 [len(ids) - 1, V]."""
        with tempfile.TemporaryDirectory() as folder:
            ids_path, output = Path(folder, "ids.json"), Path(folder, "logits.npy")
            ids_path.write_text(json.dumps(ids))
            self.run(program, f"--score_ids_path={ids_path}", f"--logits_path={output}")
            return torch.from_numpy(np.load(output))


@pytest.fixture(scope="session")
def runner(build_dir: Path) -> Runner:
    binary = build_dir / "runner" / "qwen3_5_moe_runner"
    assert binary.is_file(), f"{binary} is not built"
    return Runner(binary)


@pytest.fixture(scope="session")
def sanitize_dir() -> Path:
    """A build with AddressSanitizer and UBSan: the preset `sanitize`, see scripts/test.sh."""
    path = Path(os.environ.get("ET_MOE_SANITIZE_BUILD_DIR", REPO / "build" / "sanitize"))
    if not path.is_dir():
        pytest.fail(f"{path}: no build found; run scripts/test.sh")
    return path


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a kernel test live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a layer of each kind and a tokenizer of bytes."""
    from checkpoints import make_small

    return made_once(tmp_path_factory, "tiny_checkpoint", make_small)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`: INT4 in groups of 32, INT8 embedding."""
    from checkpoints import storages

    from et_moe.pipeline.bundle import write_bundle
    from et_moe.pipeline.checkpoint import Checkpoint
    from et_moe.pipeline.quantize import QuantizedCheckpoint

    source = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), storages("4w", 32, "8w"))
    return made_once(tmp_path_factory, "tiny_bundle", lambda folder: write_bundle(source, folder))


@pytest.fixture(scope="session")
def demo_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, W4A8 for the CPU as scripts/demo.sh exports it."""
    from checkpoints import storages

    from et_moe.pipeline.checkpoint import Checkpoint
    from et_moe.pipeline.export import ExportOptions, export
    from et_moe.pipeline.quantize import QuantizedCheckpoint

    checkpoint = Checkpoint(REPO / "examples/qwen3_5_moe/demo_checkpoint")
    source = QuantizedCheckpoint(checkpoint, storages("4w", 32, "8w"))
    return made_once(
        tmp_path_factory, "demo_program", lambda folder: export(source, folder, ExportOptions())
    )


@pytest.fixture(scope="session")
def tiny_program(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `et-moe export` makes of `tiny_bundle` for the CPU, with a context of 32 tokens."""
    from et_moe.pipeline.bundle import Bundle
    from et_moe.pipeline.export import ExportOptions, export

    bundle, options = Bundle(tiny_bundle), ExportOptions(max_seq_len=32)
    return made_once(tmp_path_factory, "tiny_program", lambda path: export(bundle, path, options))


@pytest.fixture(scope="session")
def scored_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoint`, a small model in fp32 with a head for drafts and a context of 256
    tokens, and its programs for the CPU, not quantized: `plain`, `score` with the method of this
    name, and `drafts` with it and with two drafts."""
    from checkpoints import change_config, make_small, storages

    from et_moe.pipeline.checkpoint import Checkpoint
    from et_moe.pipeline.export import ExportOptions, export
    from et_moe.pipeline.quantize import QuantizedCheckpoint

    def make(folder: Path) -> None:
        checkpoint = folder / "checkpoint"
        make_small(checkpoint, max_position_embeddings=256, mtp_num_hidden_layers=1)
        change_config(checkpoint, dtype="float32")
        source = QuantizedCheckpoint(Checkpoint(checkpoint), storages("none", 128, "none"))
        for name, more in (("plain", {}), ("score", {}), ("drafts", {"draft_tokens": 2})):
            options = ExportOptions(max_sequences=1, score=name != "plain", **more)
            export(source, folder / name, options)

    return made_once(tmp_path_factory, "scored_model", make)
