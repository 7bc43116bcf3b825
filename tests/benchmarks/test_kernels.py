"""The parts of the kernel benchmark that need no GPU: what it calls, and what it makes of times."""

import contextlib

import torch

from et_moe.backends.cuda.triton.cases.launches import record_launches
from et_moe.benchmarks import roofline, stream_floor
from et_moe.benchmarks.report import kernels as report
from et_moe.benchmarks.subjects import subjects


def test_subjects_launch_what_their_cost_counts():
    device = torch.device("meta")
    seen = set()
    for subject in subjects(device, None, ""):
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


def row(m, kernel, us, peer=False, part=False, floor=None):
    found = {"subject": "s", "m": m, "kernel": kernel, "us": us, "peer": peer, "part": part}
    return found | {"roof_us": 1.0, "floor_us": floor}


def test_compare_takes_the_fastest_of_each_side():
    rows = [row(1, "a", 4.0, floor=1.5), row(1, "b", 2.0, floor=1.5)]
    rows += [row(1, "p", 6.0, True), row(1, "q", 5.0, True), row(1, "r", 1.0, True, True)]
    rows += [row(2, "a", 8.0), {"subject": "s", "m": 2, "kernel": "p", "peer": True, "error": "no"}]
    lines = report.compare(rows)
    assert lines[0]["kernel"] == "b" and lines[0]["peer"] == "q" and lines[0]["part"] == "r"
    assert report.cells(lines[0]) == ["s", "1", "b", "2.0", "q", "5.0", "2.50", "50%", "75%"]
    assert lines[1]["peer"] is None and lines[1]["part"] is None
    assert report.cells(lines[1]) == ["s", "2", "a", "8.0", "", "", "", "12%", ""]


def test_a_failure_of_ours_leaves_its_line_out():
    failed = {"subject": "s", "m": 1, "kernel": "a", "peer": False, "part": False, "error": "no"}
    assert report.compare([failed, row(1, "p", 6.0, True)]) == []


def test_section_has_a_column_a_number_of_tokens(tmp_path):
    rows = [row(1, "a", 4.0, floor=1.5), row(1, "p", 6.0, True), row(1, "r", 1.0, True, True)]
    rows += [row(2, "b", 8.0), row(2, "q", 6.0, True)]
    roof = {"bandwidth": 4e12, "int8": 1.6e15, "bf16": 8e14}
    head = {"machine": "G", "command": "x", "commit": "0123456789", "cpus": 2, "roof": roof}
    condensed = report.condense(head | {"rows": rows})
    text = "\n".join(report.section(condensed))
    for line in (
        "| what | figure | 1 | 2 |",
        "| s | us | 4.0 | 8.0 |",
        "|  | wheel's best, us | 6.0 | 6.0 |",
        "|  | times as fast | 1.50 | 0.75 |",
        "|  | part of the work by the wheel, us | 1.0 |  |",
        "|  | of roof | 25% | 12% |",
        "|  | of floor | 38% |  |",
        "- s: `a`, `b` against `p`, `q`; a part of the work: `r`",
    ):
        assert line in text.splitlines(), line
    assert "Measured roof: 4.00 TB/s, 1600 TOPS INT8, 800 TFLOPS bf16." in text
    report.plot(condensed, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_read_kernel_reads_everything_once(device):
    sources = [torch.randint(0, 9, (n,), dtype=torch.int32, device=device) for n in (16, 2064)]
    for source in sources:
        sums = torch.full((4,), -1, dtype=torch.int32, device=device)
        stream_floor.read_all([source], sums, 1024, 4)
        expected = [int(part.sum()) for part in source.split(1024)]
        assert sums.tolist() == expected + [-1] * (4 - len(expected))


def test_floor_is_the_fastest_configuration_of_as_many_launches(device, monkeypatch):
    launches, calls = [], []

    def record(kernel, grid, source, *_, **__):
        launches.append((grid[0], source.nbytes))

    def timed(functions):
        launches.clear()
        functions[0]()
        calls.append(list(launches))
        return 10.0 - len(calls)

    monkeypatch.setattr(stream_floor, "microseconds", timed)
    monkeypatch.setattr(stream_floor, "launched_as_in_programs", contextlib.nullcontext)
    monkeypatch.setattr(stream_floor, "launch", record)
    floor = stream_floor.Floor(device, 1 << 20)
    kernels = [roofline.Kernel("a", 100_000.0), roofline.Kernel("b", 0.0)]
    configs = len(stream_floor.CONFIGS)
    assert floor(kernels) == 10.0 - configs and floor(list(kernels)) == 10.0 - configs
    assert len(calls) == configs
    for (block, _), made in zip(stream_floor.CONFIGS, calls, strict=True):
        assert made == [(-(-100_032 // (4 * block)), 100_032), (1, 64)]
