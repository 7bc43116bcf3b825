"""The table of GPUs, and pretending to have one."""

import dataclasses
import os
import platform
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime.hints import DeviceProperties

from et_moe.backends.cuda import gpu
from et_moe.backends.cuda.build import toolchain
from et_moe.backends.cuda.errors import ToolchainError
from et_moe.backends.cuda.gpu import ARCHS, GPUS, TWINS, default_archs, gpu_for, pretend_gpu

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """Other tests of this process may have turned Triton's interpreter on."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


def _patched_objects() -> list[object]:
    return [target for target, _ in gpu._patches(GPUS[0])]


def _snapshot() -> list[dict[str, object]]:
    return [dict(vars(target)) for target in _patched_objects()]


def test_table():
    assert ARCHS == ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    assert len({g.name for g in GPUS}) == len(GPUS)
    assert [gpu_for(a).compute_capability for a in ARCHS] == [
        (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)
    ]  # fmt: skip
    assert gpu_for("sm_90").name == "NVIDIA H200"
    assert gpu_for("sm_90").shared_memory_per_block == 232448
    assert gpu_for("sm_120").shared_memory_per_block == 101376


def test_the_delegate_advises_what_export_accepts():
    """It cannot ask the exporter, and has a list of its own."""
    source = (REPO / "backends/cuda/runtime/metadata.cpp").read_text()
    names = re.search(r"exported = \{(.*?)\}", source, re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', names)) == {*ARCHS, *TWINS}


def test_twins_share_limits_and_tuning():
    for twin, other in (("sm_103", "sm_100"), ("sm_121", "sm_120")):
        one, two = gpu_for(twin), gpu_for(other)
        assert one == dataclasses.replace(two, arch=twin)
        with pretend_gpu(one):
            assert triton.runtime.driver.active.get_current_target().arch == int(twin[3:])


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"'sm_75' is not supported: .*sm_80.*sm_121"):
        gpu_for("sm_75")


@pytest.mark.parametrize("arch", ARCHS)
def test_answers_come_from_the_table(arch):
    target = gpu_for(arch)
    with pretend_gpu(target):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.cuda.get_device_name() == target.name
        assert torch.cuda.get_device_capability() == target.compute_capability
        properties = torch.cuda.get_device_properties(0)
        assert properties.multi_processor_count == target.sm_count
        assert properties.shared_memory_per_block_optin == target.shared_memory_per_block
        # Inductor and Triton keep in caches what they learn of a GPU: that of an earlier one must
        # not be used for a later one.
        learned = DeviceProperties.create(torch.device("cuda", 0))
        major, minor = target.compute_capability
        assert (learned.cc, learned.multi_processor_count) == (10 * major + minor, target.sm_count)
        assert triton.compiler.compiler.max_shared_mem(0) == target.shared_memory_per_block
        assert triton.runtime.driver.active.get_current_target().arch == 10 * major + minor
        assert CudaInterface.Worker.get_device_properties().name == target.name


def test_everything_is_put_back():
    before, available = _snapshot(), torch.cuda.is_available()
    with pretend_gpu(gpu_for("sm_90")):
        inside = _snapshot()
    assert _snapshot() == before
    # Every object must really have been patched, or else this test shows nothing.
    assert all(a != b for a, b in zip(before, inside, strict=True))
    assert torch.cuda.is_available() == available
    assert DeviceProperties.create.__func__.cache_info().currsize == 0


def test_everything_is_put_back_after_an_exception():
    before = _snapshot()
    with pytest.raises(KeyError), pretend_gpu(gpu_for("sm_80")):
        raise KeyError("inside")
    assert _snapshot() == before


def test_nesting_restores_the_outer_gpu():
    with pretend_gpu(gpu_for("sm_90")):
        with pretend_gpu(gpu_for("sm_80")):
            assert torch.cuda.get_device_capability() == (8, 0)
        assert torch.cuda.get_device_capability() == (9, 0)
        assert DeviceProperties.create(torch.device("cuda", 0)).cc == 90


@pytest.mark.parametrize(
    ("torch_version", "triton_version"),
    [("2.11.0", "3.6.0"), ("2.13.0", "3.6.0"), ("2.14.1", "3.7.1")],
)
def test_version_guard(monkeypatch, torch_version, triton_version):
    before = _snapshot()
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(triton, "__version__", triton_version)
    message = (
        f"not supported with torch {torch_version} and triton {triton_version}: expected torch"
    )
    with pytest.raises(ToolchainError, match=message), pretend_gpu(gpu_for("sm_90")):
        pytest.fail("entered")
    assert _snapshot() == before


def test_interpreter_guard(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    refused = pytest.raises(ToolchainError, match="unset TRITON_INTERPRET")
    with refused, pretend_gpu(gpu_for("sm_90")):
        pytest.fail("entered")


def _nvidia_smi(tmp_path, monkeypatch, script: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 9.0", ["sm_90"]),
        ("printf '8.9\\n12.0\\n8.9\\n'", ["sm_89", "sm_120"]),
        ("exit 9", list(ARCHS)),
        ("true", list(ARCHS)),
    ],
)
def test_default_architectures(tmp_path, monkeypatch, script, expected):
    _nvidia_smi(tmp_path, monkeypatch, script)
    assert default_archs() == expected


def test_default_architecture_of_an_unknown_gpu(tmp_path, monkeypatch):
    _nvidia_smi(tmp_path, monkeypatch, "echo 7.5")
    with pytest.raises(ValueError, match="sm_75"):
        default_archs()


def test_no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert default_archs() == list(ARCHS)


def test_missing_toolkit_is_named(monkeypatch):
    import nvidia.cu13

    monkeypatch.setattr(nvidia.cu13, "__path__", ["/nonexistent"])
    with pytest.raises(ToolchainError, match=r"no CUDA headers found: .*et-moe\[cuda\]"):
        toolchain()
    with pytest.raises(ToolchainError, match=r"no ptxas found: .*et-moe\[cuda\]"):
        gpu.ptxas()


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    compiler = shutil.which("g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"^g\+\+ not found: a C\+\+ compiler is needed$"):
        toolchain()
    (tmp_path / "g++").symlink_to(compiler)
    with pytest.raises(ToolchainError, match=r"^nm not found: a C"):
        toolchain()


def test_other_machines_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ToolchainError, match="needs an x86-64 machine, this is aarch64: "):
        toolchain()
