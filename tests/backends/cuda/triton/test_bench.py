"""The benchmark's parts that need no GPU: what it calls, and what it makes of times."""

import sys
from pathlib import Path

import pytest
import torch

from et_moe.backends.cuda.triton.compile_case import record_launches

SCRIPTS = Path(__file__).resolve().parents[4] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_kernels
    import bench_subjects

    yield bench_kernels, bench_subjects
    for name in ("bench_kernels", "bench_subjects", "gpu_timing", "roofline"):
        sys.modules.pop(name, None)


def test_subjects_launch_what_their_cost_counts(scripts):
    device = torch.device("meta")
    seen = set()
    for subject in scripts[1].subjects(device, None, ""):
        for m in (1, 4095):
            for contender in subject.contenders:
                if not contender.takes(m) or contender.name == "moe_w4a16":
                    continue  # moe_w4a16 leaves the quantization out
                with record_launches() as launches:
                    contender.call(**contender.arguments(m))
                assert len(launches) == len(subject.cost(m)), (subject.name, contender.name, m)
                assert all(kernel.bytes >= 0 for kernel in subject.cost(m))
                seen.add(subject.name)
    assert {"experts", "in_proj", "delta rule", "attention", "router", "sample"} <= seen


def row(m, kernel, us, peer=False):
    return {"subject": "s", "m": m, "kernel": kernel, "us": us, "peer": peer, "roof_us": 1.0}


def test_compare_takes_the_fastest_of_each_side(scripts, tmp_path):
    rows = [row(1, "a", 4.0), row(1, "b", 2.0), row(1, "p", 6.0, True), row(1, "q", 5.0, True)]
    rows += [row(2, "a", 8.0), {"subject": "s", "m": 2, "kernel": "p", "peer": True, "error": "no"}]
    lines = scripts[0].compare(rows)
    assert lines[0]["kernel"] == "b" and lines[0]["peer"] == "q"
    assert lines[0]["speedup"] == pytest.approx(2.5) and lines[0]["of_roof"] == pytest.approx(0.5)
    assert lines[1]["peer"] is None and lines[1]["us"] == 8.0
    result = {
        "gpu": "G",
        "torch": "2",
        "triton": "3",
        "executorch": "1",
        "roof": {"bandwidth": 4e12, "int8": 1.6e15, "bf16": 8e14},
    }
    text = scripts[0].report(lines, result)
    assert "| s | 1 | b | 2.0 | q | 5.0 | 2.50 | 50% |" in text
    assert "| s | 2 | a | 8.0 |  |  |  | 12% |" in text
    scripts[0].plot([r for r in rows if "us" in r], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
