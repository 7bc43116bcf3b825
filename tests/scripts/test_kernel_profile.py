"""Reading kernel traces: which launches make up the last prefill and the last decoded token."""

import pytest


@pytest.fixture
def tool(scripts_path):
    import kernel_profile

    return kernel_profile


LAYER = ["norm", "mix", "route", "experts"]
DECODE = ["embed", *LAYER, *LAYER, "head", "sample"]
PREFILL = ["embed", *LAYER, "sum", *LAYER, "sum", "head", "sample"]


def launches(tool, names):
    return [tool.Launch(10 * i, 10 * i + 7, name) for i, name in enumerate(names)]


def test_last_calls(tool):
    iteration = PREFILL + 4 * DECODE
    prefill, decode = tool.last_calls(launches(tool, ["copy", *iteration, *iteration]), 4)
    assert [x.name for x in prefill] == PREFILL and [x.name for x in decode] == DECODE
    assert prefill[-1].end <= decode[0].start


def test_a_prefill_of_several_calls_is_one(tool):
    iteration = 2 * PREFILL + 4 * DECODE
    prefill, _ = tool.last_calls(launches(tool, iteration + iteration), 4)
    assert [x.name for x in prefill] == 2 * PREFILL


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (PREFILL + 4 * DECODE, "no prefill between two runs of decode"),
        (PREFILL + 3 * DECODE + PREFILL + 3 * DECODE, "4 equal decode calls"),
        ([], "4 equal decode calls"),
        (8 * DECODE, "no prefill between two runs of decode"),
    ],
)
def test_traces_that_cannot_be_split(tool, names, message):
    with pytest.raises(tool.ProfileError, match=message):
        tool.last_calls(launches(tool, names), 4)


def test_parse_and_summarize(tool):
    read = tool.parse_trace("3000\t9000\tvoid f<int, 2>(int)\n1000\t2000\tg\nend\t0\tdropped\n")
    assert [x.name for x in read] == ["g", "void f<int, 2>(int)"]
    summary = tool.summarize([*read, tool.Launch(9500, 10500, "g")])
    assert summary["launches"] == 3 and summary["kernels_us"] == pytest.approx(8.0)
    assert summary["span_us"] == pytest.approx(9.5)
    assert [(k["name"], k["launches"]) for k in summary["kernels"]] == [
        ("void f<int, 2>(int)", 1),
        ("g", 2),
    ]
    assert summary["kernels"][1]["share"] == pytest.approx(0.25)


@pytest.mark.parametrize("text", ["", "1\t2\tg\n"])
def test_a_cut_trace_is_refused(tool, text):
    with pytest.raises(tool.ProfileError, match="cut off"):
        tool.parse_trace(text)


def test_dropped_kernels_are_refused(tool):
    with pytest.raises(tool.ProfileError, match="dropped 12"):
        tool.parse_trace("1\t2\tg\nend\t12\tdropped\n")


def test_without_cupti_there_is_no_profile(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "_cuda_folders", lambda: [])
    made = tool.profile(["true"], tmp_path)
    assert made["decode"] is None and "CUPTI not found" in made["error"]


def test_a_run_without_cuda_has_no_trace(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "build_tracer", lambda output: output)
    assert "did not load the tracer" in tool.profile(["true"], tmp_path)["error"]
    assert "the traced run failed" in tool.profile(["false"], tmp_path)["error"]
