"""A method of a symbolic number of sequences compiles, and launches the kernels of a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_batch_compiles(tmp_path):
    report = tmp_path / "report.json"
    script = Path(__file__).with_name("batch_method.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, report], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(report.read_text())
    assert list(got) == ["4", "16"]
    state = {"_decode_kernel", "_combine_kernel", "_conv_step_kernel", "_step_kernel"}
    kernels = state | {"_choose_kernel", "_block_kernel", "_collect_kernel", "_finish_kernel"}
    kernels |= {"quantize_rows_kernel", "_norm_rows_kernel"}
    for longest, linear in (
        ("4", {"_rows_kernel", "_dense_rows_kernel"}),
        ("16", {"_gemm_kernel", "_dense_gemm_kernel"}),
    ):
        dependent, expected = got[longest], kernels | linear
        assert expected <= set(dependent)
        # The first kernel of a method may not start early; those behind it read nothing too early.
        assert all(dependent[name] for name in expected - {"_decode_kernel"})
