"""Fixtures that every test folder shares."""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, its own functions at its first import. What
    # compiles kernels does so in a process of its own.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Tensors are small, and pytest-xdist has a process for every core. Threads of torch, here and
    # in what tests start, would spend most of their time waiting for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A test run that was started in the background may ignore SIGHUP, and so would what tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The CMake build folder that holds the runner and the C++ test tools."""
    path = Path(os.environ.get("ET_MOE_BUILD_DIR", REPO / "build"))
    if not path.is_dir():
        pytest.fail(f"{path}: no build found; run scripts/setup.sh or set ET_MOE_BUILD_DIR")
    return path


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

    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_small(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """The bundle of `tiny_checkpoint`: INT4 in groups of 32, INT8 embedding."""
    from checkpoints import storages

    from et_moe.pipeline.bundle import write_bundle
    from et_moe.pipeline.checkpoint import Checkpoint
    from et_moe.pipeline.quantize import QuantizedCheckpoint

    directory = tiny_checkpoint.with_name("bundle")
    source = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), storages("4w", 32, "8w"))
    write_bundle(source, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_program(tiny_bundle: Path) -> Path:
    """What `et-moe export` makes of `tiny_bundle` for the CPU, with a context of 32 tokens."""
    from et_moe.pipeline.bundle import Bundle
    from et_moe.pipeline.export import ExportOptions, export

    directory = tiny_bundle.with_name("program")
    export(Bundle(tiny_bundle), directory, ExportOptions(max_seq_len=32))
    return directory
