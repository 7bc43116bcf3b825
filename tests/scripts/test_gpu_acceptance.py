"""The acceptance run of a GPU: its report, and that its comparisons fail where they must.

The programs here are for the CPU; the runner takes the same flags for them.
"""

import functools
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import acceptance_models as models
import acceptance_session
import gpu_acceptance as acceptance
import numpy as np
import pack_acceptance as packer
import pytest
import torch

SCRIPTS = Path(packer.__file__).parent


def test_models_that_agree(session):
    checks = acceptance.models(session)["checks"]
    assert [c["check"] for c in checks] == ["tokens", "tokens", "tokens", "batch", "logits"] * 2
    assert [c["mode"] for c in checks] == ["eager"] * 5 + ["graphs"] * 5
    assert all(c["error"] is None for c in checks)
    assert checks[4]["top1"] == 1 and checks[4]["relative_error"] == 0
    log = session.log.read_text()
    assert log.count("[exit code 0,") == 10 and log.count("--cuda_graph") == 5


def test_a_differing_token_is_caught(session):
    case = session.manifest["models"][0]["cases"][1]
    right = case["expected_ids"][1]
    case["expected_ids"][1] = right + 1
    with pytest.raises(
        acceptance.StepFailed, match="4 of 10 checks failed; small, eager"
    ) as failed:
        acceptance.models(session)
    checks = failed.value.found["checks"]
    wrong = [c for c in checks if c["error"]]
    found = [(c["mode"], c.get("prompt_tokens", c["check"])) for c in wrong]
    assert found == [("eager", 3), ("eager", "batch"), ("graphs", 3), ("graphs", "batch")]
    expected = f"token 1 of {len(case['expected_ids'])} is {right}, expected {right + 1}"
    assert wrong[0]["error"] == expected
    assert wrong[1]["error"] == f"prompt of 3 tokens: {expected}"


@pytest.mark.parametrize("broken", ["zeros", "nan", "shape"])
def test_differing_logits_are_caught(session, broken):
    path = session.folder / "models/small" / models.EXPECTED_LOGITS
    logits = np.load(path)
    if broken == "zeros":
        np.save(path, np.zeros_like(logits))
    elif broken == "nan":
        np.save(path, np.full_like(logits, np.nan))
    else:
        np.save(path, logits[:-1])
    with pytest.raises(acceptance.StepFailed, match="2 of 10 checks failed") as failed:
        acceptance.models(session)
    message = failed.value.found["checks"][4]["error"]
    most = f"expected at most {models.TOLERANCES['float32'].relative_error}"
    assert ("of shape" if broken == "shape" else most) in message


def test_a_runner_that_fails_is_an_error_of_each_check(session):
    (session.folder / "models/small/model.ptd").unlink()
    with pytest.raises(acceptance.StepFailed, match="10 of 10 checks failed") as failed:
        acceptance.models(session)
    for check in failed.value.found["checks"]:
        assert "exit code 1" in check["error"] and "model.ptd" in check["error"]


def test_no_models_is_no_pass(session):
    session.manifest["models"] = []
    with pytest.raises(acceptance.StepFailed):
        acceptance.models(session)


def test_nan_logits_are_wrong():
    expected = np.eye(3, dtype="f4")
    found = models.compare_logits(np.full_like(expected, np.nan), expected, 0.1)
    assert found["top1"] == found["settled_top1"] == 0 and not found["relative_error"] <= 1


def test_another_token_is_right_only_at_a_near_tie():
    expected = np.array([[5, 0, 0, 0], [0, 5, 4.99, 0], [0, 0, 0, 5]], "f4")
    actual = expected.copy()
    actual[1, 2] = 5.01
    found = models.compare_logits(actual, expected, 0.1)
    assert found["settled"] == 2 and found["settled_top1"] == 1 and found["top1"] < 1
    actual[2, 0] = 5.01
    assert models.compare_logits(actual, expected, 0.1)["settled_top1"] == 0.5


def test_tokens_count():
    assert models.compare_tokens([1, 2], [1, 2]) is None
    assert models.compare_tokens([1], [1, 2]) == "1 tokens, expected 2"
    assert models.compare_tokens([], [1]) == "0 tokens, expected 1"


def test_a_case_ends_at_a_near_tie(tmp_path):
    logits = np.zeros((5, 4), "f4")  # of ids 1 to 5; the last three are generated
    logits[range(5), [1, 2, 3, 0, 1]] = 1
    logits[3, 2] = 0.999

    class Fake:
        def generate(self, prompt_ids, count):
            return [3, 0, 1][:count]

        def logits(self, ids):
            return logits[: len(ids) - 1]

    case = models.make_case(Fake(), [0, 1, 2], 3, 0.01)
    assert case.expected_ids == [3] and case.least_margin == pytest.approx(1 / np.std([0, 0, 0, 1]))
    assert models.make_case(Fake(), [0, 1, 2], 3, 1e-5).expected_ids == [3, 0, 1]


def steps():
    def fail(session):
        raise acceptance.StepFailed("no good", {"seen": 1})

    def skip(session):
        raise acceptance.NotRun("no tool")

    def slow(session):
        session.run([sys.executable, "-c", "import time; time.sleep(60)"])

    def broken(session):
        raise KeyError("x")

    def fine(session):
        return {"text": session.run(["echo", "hello"])}

    made = {"fail": fail, "skip": skip, "slow": slow, "broken": broken, "fine": fine}
    # The last step may start late on a busy machine, as one before it is stopped at its deadline.
    return [
        acceptance.Step(name, run, (60.0 if name == "fine" else 1.0, 0.5))
        for name, run in made.items()
    ]


def test_every_step_is_run_and_reported(session, tmp_path):
    report, path = {"status": "incomplete"}, tmp_path / "report.json"
    begin = time.monotonic()
    acceptance.run_steps(steps(), session, report, path)
    assert time.monotonic() - begin < 55
    written = json.loads(path.read_text())
    assert written == report and written["status"] == "failed"
    outcomes = {s["name"]: (s["status"], s["reason"]) for s in written["steps"]}
    assert outcomes["fail"] == ("failed", "no good")
    assert outcomes["skip"] == ("not run", "no tool")
    assert outcomes["slow"][0] == "failed" and outcomes["slow"][1].startswith("out of time")
    assert outcomes["broken"] == ("failed", "KeyError: 'x'")
    assert outcomes["fine"] == ("passed", None)
    found = {s["name"]: s["found"] for s in written["steps"]}
    assert found["fail"] == {"seen": 1} and found["fine"] == {"text": "hello\n"}
    # The slow step had the time that those before it left.
    assert 2 < written["steps"][2]["seconds"] < 50
    assert "hello" in session.log.read_text() and "[out of time" in session.log.read_text()


@pytest.mark.parametrize(("names", "status"), [(("fine", "skip"), "passed"), ((), "failed")])
def test_what_does_not_fail_passes(session, tmp_path, names, status):
    chosen = [s for s in steps() if s.name in (names or ("fine", "fail"))]
    report = {}
    acceptance.run_steps(chosen, session, report, tmp_path / "report.json")
    assert report["status"] == status


JUNIT = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">
<testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>
<testcase classname="a" name="z"><error/></testcase><testcase classname="a" name="s"><skipped/>
</testcase><testcase classname="a" name="t"/></testsuite></testsuites>"""


def test_counts_of_junit(tmp_path):
    (tmp_path / "j.xml").write_text(JUNIT)
    found = acceptance.junit_counts(tmp_path / "j.xml")
    expected = {"passed": 2, "failed": 2, "skipped": 1, "failing": ["a::y", "a::z"]}
    assert found == expected


def run_kernel_tests(session, monkeypatch, text):
    tests = session.scratch / "tests_of_kernels"
    tests.mkdir()
    (session.scratch / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    monkeypatch.setattr(acceptance_session, "REPO", session.scratch)
    (tests / "test_it.py").write_text(text)
    monkeypatch.setattr(acceptance, "KERNEL_TESTS", tests.name)
    return acceptance.kernel_tests(session)


def test_kernel_tests_see_failures_and_no_interpreter(session, monkeypatch):
    text = "import os\ndef test_a(): assert os.environ['TRITON_INTERPRET'] == '0'\n"
    text += "def test_b(): assert False\n"
    with pytest.raises(acceptance.StepFailed, match="1 tests passed, 1 failed") as failed:
        run_kernel_tests(session, monkeypatch, text)
    assert failed.value.found["failing"] == ["tests_of_kernels.test_it::test_b"]


def test_skipped_tests_do_not_pass(session, monkeypatch):
    text = "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n"
    with pytest.raises(acceptance.StepFailed, match="0 tests passed"):
        run_kernel_tests(session, monkeypatch, text)


def test_kernel_tests_that_take_too_long(session, monkeypatch):
    """Time runs out as soon as one of them takes long; what has passed by then is reported."""
    slow = session.scratch / "slow"
    text = "import pathlib, pytest, time\n@pytest.mark.parametrize('n', range(6))\n"
    text += f"def test_a(n):\n    if n > 3: pathlib.Path({str(slow)!r}).touch(); time.sleep(600)\n"
    looks = []

    def left(session) -> float:
        looks.append(time.monotonic())
        while len(looks) > 1 and not slow.exists() and time.monotonic() < looks[0] + 120:
            time.sleep(0.05)
        return 0.1

    monkeypatch.setattr(acceptance.Session, "left", left)
    stop = functools.partial(acceptance_session._stop, grace=120)
    monkeypatch.setattr(acceptance_session, "_stop", stop)
    with pytest.raises(acceptance.StepFailed, match=r"out of time: \d tests passed") as failed:
        run_kernel_tests(session, monkeypatch, text)
    assert failed.value.found["passed"] >= 1
    assert time.monotonic() < looks[0] + 300


def test_quick_runs_every_fourth_test(session, monkeypatch):
    session.quick = True
    text = "import pytest\n@pytest.mark.parametrize('n', range(10))\ndef test_a(n): pass\n"
    found = run_kernel_tests(session, monkeypatch, text)
    assert found == {"passed": 3, "failed": 0, "skipped": 0, "failing": []}


def fake_tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def test_sanitizer(session, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(acceptance.NotRun, match="compute-sanitizer is not installed"):
        acceptance.sanitize(session)
    tools = fake_tool(
        tmp_path / "tools",
        "compute-sanitizer",
        'shift 2; "$@" && echo "== ERROR SUMMARY: 0 errors"',
    )
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    runs = acceptance.sanitize(session)["runs"]
    assert [(r["tool"], r["mode"]) for r in runs] == [
        ("memcheck", "graphs"),
        ("memcheck", "eager"),
        ("racecheck", "eager"),
    ]
    assert all(r["summary"] == ["ERROR SUMMARY: 0 errors"] for r in runs)
    fake_tool(tools, "compute-sanitizer", "echo '== ERROR SUMMARY: 2 errors'; exit 86")
    with pytest.raises(acceptance.StepFailed, match=r"memcheck, graphs: exit code 86.*2 errors"):
        acceptance.sanitize(session)
    fake_tool(tools, "compute-sanitizer", "echo nothing")
    with pytest.raises(acceptance.StepFailed, match="nothing"):
        acceptance.sanitize(session)


def test_kernels_that_cannot_be_timed_fail_the_benchmark(session, monkeypatch):
    rows = [{"kernel": "peer", "m": 1, "peer": True, "error": "no"}]
    output = ""

    def benchmark(session, name, *flags):
        return {"rows": rows}, output

    monkeypatch.setattr(acceptance, "_benchmark", benchmark)
    assert acceptance.kernel_benchmark(session) == {"rows": rows}
    output = "stopped after 3 s; what follows experts was not measured"
    with pytest.raises(acceptance.StepFailed, match="some kernels were not measured"):
        acceptance.kernel_benchmark(session)
    rows.append({"kernel": "moe", "m": 16, "peer": False, "error": "spilled"})
    with pytest.raises(acceptance.StepFailed, match="moe at M = 16: spilled"):
        acceptance.kernel_benchmark(session)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_benchmark_that_fails(session):
    with pytest.raises(acceptance.StepFailed, match=r"kernels: exit code 1: .*no CUDA GPU"):
        acceptance._benchmark(session, "kernels")


def run_script(folder):
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"}
    command = [SCRIPTS / "gpu_acceptance.sh", "--quick", folder]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(folder):
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels/first-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sitecustomize.py", "print('from a wheel')")
    done = run_script(folder)
    assert done.returncode == 1, done.stderr
    assert "from a wheel" in done.stdout and "no NVIDIA GPU found" in done.stdout
    assert not (folder / "results").exists()


def test_wheels_of_another_python(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"python": "3.99"}))
    done = run_script(folder)
    assert done.returncode == 1 and "its wheels are for Python 3.99" in done.stderr


def test_folder_that_was_not_packed(tmp_path):
    for arguments in ([], [tmp_path]):
        command = [SCRIPTS / "gpu_acceptance.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "made by scripts/pack_acceptance.sh" in done.stderr


def test_packed_runner_brings_its_libraries(folder):
    binary = folder / "bin/qwen3_5_moe_runner"
    names = {path.name for path in (folder / "lib").iterdir()}
    assert {"libexecutorch.so", "libcudart.so.13"} <= names
    found = packer.libraries(binary)
    assert all(found[name].parent.samefile(folder / "lib") for name in names)
    (folder / "lib/libexecutorch.so").unlink()
    assert packer.libraries(binary)["libexecutorch.so"] != folder / "lib/libexecutorch.so"


def test_packages_are_those_of_the_project():
    lines = packer.requirements((packer.REPO / "pyproject.toml").read_text())
    assert [line.split(">")[0] for line in lines] == list(packer.PACKAGES)


def test_packing_spares_other_folders(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    command = [sys.executable, SCRIPTS / "pack_acceptance.py", tmp_path]
    environment = os.environ | {"COLUMNS": "300"}  # messages are wrapped
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0 and "holds other files" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"
