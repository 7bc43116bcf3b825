"""Internals of torch and Triton on which compiling relies, and whose change no result would show.

docs/lowering.md lists them all.
"""

import importlib.util
import os
from pathlib import Path

import pytest
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from et_moe.backends.cuda import inductor
from et_moe.backends.cuda.gpu import ptxas, ptxas_environment


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_triton_uses_the_assembler_of_the_wheel(monkeypatch, capability: int) -> None:
    assert not os.path.samefile(get_ptxas(capability).path, ptxas())
    for name, value in ptxas_environment().items():
        monkeypatch.setenv(name, value)
    assert os.path.samefile(get_ptxas(capability).path, ptxas())


def test_a_kernel_that_torch_cannot_analyse_is_an_error() -> None:
    """Torch itself warns, and assumes that the kernel writes all of its arguments."""
    nothing = triton_kernel_wrap.identify_accessed_tensors
    nothing(None, {}, {})
    with (
        pytest.raises(RuntimeError, match="exception in identify_accessed_tensors"),
        inductor._strict_kernel_analysis(),
    ):
        nothing(None, {}, {})
    nothing(None, {}, {})  # the handler has been removed again


def import_file(folder: Path, name: str, source: str):
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("other", [64, 128])
def test_a_name_with_two_meanings_is_an_error(tmp_path: Path, other: int) -> None:
    """A kernel and a function of another file, which it calls, both have a global BLOCK."""
    inner = import_file(tmp_path, "inner", f"BLOCK = {other}\ndef add(x):\n    return x + BLOCK\n")
    outer = import_file(tmp_path, "outer", "BLOCK = 64\ndef kernel(x):\n    add(x) + BLOCK\n")
    outer.add = JITFunction(inner.add)
    if other == outer.BLOCK:
        inductor._check_names(JITFunction(outer.kernel), {})
    else:
        with pytest.raises(RuntimeError, match="the name BLOCK has another meaning"):
            inductor._check_names(JITFunction(outer.kernel), {})
