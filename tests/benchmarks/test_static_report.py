"""Machine code of all kernels in all tuned configurations for all architectures; needs no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[4] / "scripts" / "static_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("static_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["static_report"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["static_report"]


def test_all_kernels_compile_well():
    # Kernels of this process may be interpreted: those to compile need one of their own.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=850
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 faults" in done.stdout


@pytest.mark.parametrize(
    "change,fault",
    [
        ({}, None),
        ({"error": "no"}, "no"),
        ({"spilled_bytes": 8}, "8 bytes spilled"),
        ({"shared_memory": 300000}, "shared memory"),
        ({"int8_mma": []}, "tensor-core"),
        ({"int8_mma": ["mma.sync"]}, "wgmma"),
        ({"load_widths": {"w": [8, 16]}}, "w is loaded"),
        ({"load_widths": {}}, "w is loaded never"),
    ],
)
def test_faults(report, change, fault):
    job = report.Job("m", "k", "sm_90", (), (), (), ())
    demands = report.Demands(tensor_cores=True, wgmma=True, streams={"w"})
    row = {
        "spilled_bytes": 0,
        "shared_memory": 1000,
        "int8_mma": ["wgmma.mma_async"],
        "load_widths": {"w": [16]},
    }
    found = report.faults(job, demands, row | change)
    assert len(found) == (fault is not None) and (fault is None or fault in found[0])
