"""Kernel traces: written by the tracer, and split into the last prefill and decoded token."""

import subprocess
import sys

import pytest

from et_moe.benchmarks import profile as tool

LAYER = ["norm", "mix", "route", "experts"]
DECODE = ["embed", *LAYER, *LAYER, "head", "sample"]
PREFILL = ["embed", *LAYER, "sum", *LAYER, "sum", "head", "sample"]


def launches(names):
    return [tool.Launch(10 * i, 10 * i + 7, name) for i, name in enumerate(names)]


def test_last_calls():
    iteration = PREFILL + 4 * DECODE
    prefill, decode = tool.last_calls(launches(["copy", *iteration, *iteration]), 4)
    assert [x.name for x in prefill] == PREFILL and [x.name for x in decode] == DECODE
    assert prefill[-1].end <= decode[0].start


def test_a_prefill_of_several_calls_is_one():
    iteration = 2 * PREFILL + 4 * DECODE
    prefill, _ = tool.last_calls(launches(iteration + iteration), 4)
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
def test_traces_that_cannot_be_split(names, message):
    with pytest.raises(tool.ProfileError, match=message):
        tool.last_calls(launches(names), 4)


def test_parse_and_summarize():
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


def test_overlapping_kernels_count_once():
    """The second kernel starts early and waits; the third ends while the second runs."""
    traced = [(0, 3000, "a"), (1000, 5000, "b"), (2000, 4000, "c"), (5000, 6000, "a")]
    summary = tool.summarize([tool.Launch(*launch) for launch in traced])
    assert {k["name"]: k["us"] for k in summary["kernels"]} == {"a": 4.0, "b": 2.0, "c": 0.0}
    assert summary["kernels_us"] == summary["span_us"] == 6.0


@pytest.mark.parametrize("text", ["", "1\t2\tg\n"])
def test_a_cut_trace_is_refused(text):
    with pytest.raises(tool.ProfileError, match="cut off"):
        tool.parse_trace(text)


def test_dropped_kernels_are_refused():
    with pytest.raises(tool.ProfileError, match="dropped 12"):
        tool.parse_trace("1\t2\tg\nend\t12\tdropped\n")


def test_without_cupti_there_is_no_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "_cuda_folders", lambda: [])
    made = tool.profile(["true"], tmp_path)
    assert made["decode"] is None and "CUPTI not found" in made["error"]


def test_a_run_without_cuda_has_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "build_tracer", lambda output: output)
    assert "did not load the tracer" in tool.profile(["true"], tmp_path)["error"]
    assert "the traced run failed" in tool.profile(["false"], tmp_path)["error"]


# It hands out two kernels and a record of another kind, as CUPTI does when it is flushed.
CUPTI = """
#include <cupti.h>
#include <cstring>
static CUpti_BuffersCallbackRequestFunc request;
static CUpti_BuffersCallbackCompleteFunc complete;
static CUpti_ActivityKernel9 records[3];
static size_t next_record = 0;
extern "C" {
CUptiResult cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc r,
                                           CUpti_BuffersCallbackCompleteFunc c) {
  request = r, complete = c;
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind) {
  return kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL ? CUPTI_SUCCESS
                                                       : CUPTI_ERROR_INVALID_PARAMETER;
}
CUptiResult cuptiActivityGetNextRecord(uint8_t*, size_t, CUpti_Activity** record) {
  if (next_record == 3) return CUPTI_ERROR_MAX_LIMIT_REACHED;
  *record = reinterpret_cast<CUpti_Activity*>(&records[next_record++]);
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext, uint32_t, size_t* dropped) {
  *dropped = DROPPED;
  return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityFlushAll(uint32_t) {
  uint8_t* buffer = nullptr;
  size_t size = 0, most = 1;
  request(&buffer, &size, &most);
  if (!buffer || most) return CUPTI_ERROR_UNKNOWN;
  std::memset(records, 0, sizeof records);
  for (int i = 0; i < 3; ++i) {
    records[i].kind = i == 1 ? CUPTI_ACTIVITY_KIND_MEMCPY : CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
    records[i].start = 3000 - 1000 * i, records[i].end = 3500 - 1000 * i;
    records[i].name = i ? "moe<1, 2>" : "sample";
  }
  complete(nullptr, 0, buffer, size, 1);
  return CUPTI_SUCCESS;
}
CUptiResult cuptiGetResultString(CUptiResult, const char** text) {
  *text = "stub";
  return CUPTI_SUCCESS;
}
}
"""


@pytest.mark.parametrize("dropped", [0, 3])
def test_the_tracer(tmp_path, monkeypatch, dropped):
    """Loads the real library over a stand-in for CUPTI in a process that ends as a runner does."""
    folders = tool._cuda_folders()
    assert any((folder / "include/cupti.h").is_file() for folder in folders), "extra cuda"
    (tmp_path / "lib").mkdir()
    (tmp_path / "cupti.cpp").write_text(CUPTI)
    command = ["g++", "-shared", "-fPIC", f"-DDROPPED={dropped}", tmp_path / "cupti.cpp"]
    command += [f"-isystem{folder / 'include'}" for folder in folders]
    command += ["-Wl,-soname,libcupti.so.13", "-o", tmp_path / "lib/libcupti.so.13"]
    subprocess.run(command, check=True)
    monkeypatch.setattr(tool, "_cuda_folders", lambda: [tmp_path, *folders])
    # The driver would load the library and call it.
    program = (
        "import ctypes, os\n"
        "path = os.environ['CUDA_INJECTION64_PATH']\n"
        "assert ctypes.CDLL(path).InitializeInjection() == 1"
    )
    run = [sys.executable, "-c", program]
    if dropped:
        with pytest.raises(tool.ProfileError, match="dropped 3 kernels"):
            tool.trace(run, tmp_path)
    else:
        expected = [tool.Launch(1000, 1500, "moe<1, 2>"), tool.Launch(3000, 3500, "sample")]
        assert tool.trace(run, tmp_path) == expected


def test_the_tracer_links_against_cupti(tmp_path):
    library = tool.build_tracer(tmp_path / "trace.so")
    symbols = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True)
    assert "T InitializeInjection" in symbols.stdout
    assert "U cuptiActivityFlushAll" in symbols.stdout
