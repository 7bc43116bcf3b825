"""The engine that serves many callers, and its Python extension, over the fake driver.

With ET_MOE_FAULT_STEP=N every N-th call fails in turn, all of them with 1, which takes an hour;
without it fewer, and not the same ones eagerly, with graphs and under sanitizers.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

CAPTURE = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
TOOL = "runner/async_engine_check"
PROMPTS = [[5, 77, 130, 9, 31, 64, 250, 3, 8, 19, 20, 33, 41, 57, 101, 99, 5, 6, 7], [9, 8], [4]]


def files(program: Path) -> tuple[Path, Path]:
    return program / "model.pte", program / "model.ptd"


@CAPTURE
@pytest.mark.timeout(900)
def test_requests_of_all_kinds(fake, programs, graph: bool) -> None:
    for command in (["together", 20], ["cancel"], ["close"]):
        fake.check(*files(programs / "cuda"), int(graph), 3, *command, tool=TOOL)
        report = fake.report()
        assert not report["violations"] and not report["leaks"]


STEP = os.environ.get("ET_MOE_FAULT_STEP")
FAULTS_TIMEOUT = 900 if STEP is None else 7200


def faults(fake, program: Path, graph: bool, step: int, first: int) -> str:
    """What becomes of three requests, for every `step`-th call that fails, from the `first`."""
    command = ("faults", *((step, first) if STEP is None else (STEP, 1)))
    given = (*files(program), int(graph), 2, *command)
    return fake.check(*given, tool=TOOL, timeout=FAULTS_TIMEOUT)


@pytest.mark.parametrize(("graph", "first"), [(False, 1), (True, 2)], ids=["eager", "graph"])
@pytest.mark.timeout(FAULTS_TIMEOUT)
def test_every_call_fails_in_turn(fake, programs, graph: bool, first: int) -> None:
    printed = faults(fake, programs / "cuda", graph, 3, first)
    outcomes = [line.split()[0] for line in printed.splitlines()]
    assert len(outcomes) > 100
    assert outcomes.count("refused") > 20 and outcomes.count("failed") > 20
    # One call that fails does not break a device.
    assert "broken" not in outcomes


ENDS_THE_CONTEXT = ("cudaErrorIllegalAddress", "cudaErrorLaunchFailure")


@pytest.mark.timeout(FAULTS_TIMEOUT)
def test_calls_that_end_the_context_in_turn(fake, programs) -> None:
    """All requests end with the error, and the engine refuses more: nothing leaks, nothing hangs.

    The calls are spread over loading and serving two sequences at once.
    """
    arguments = (*files(programs / "cuda"), 1, 2, "fault")
    assert fake.check(*arguments, tool=TOOL) == "tolerated\n"
    count, outcomes = fake.report()["calls"], []
    step = -(-count // 12) if STEP is None else int(STEP)
    for n in range(1, count + 1, step):
        fault = {"fail": str(n), "error": ENDS_THE_CONTEXT[n // step % 2]}
        outcomes.append(fake.check(*arguments, tool=TOOL, **fault).split()[0])
        report = fake.report()
        assert not report["violations"] and not report["leaks"]
        if outcomes[-1] == "tolerated":  # what is released at the end, or there were fewer calls
            assert report["failed"] is None or re.search("Unload|Free|Destroy", report["failed"])
    assert outcomes.count("refused") > 1 and outcomes.count("broken") > 4


@pytest.mark.timeout(900)
def test_executed_tokens_beside_failures(fake, programs) -> None:
    """A prompt fails, then a decode call of two sequences. The one that decoded beside the prompt,
    and the one that waited all the while, draw what they draw alone."""
    sidecar = str(programs / "cuda/kernels.json")
    printed = fake.check(
        *files(programs / "cuda"), 0, 3, "survive", tool=TOOL, execute=sidecar
    ).splitlines()
    alone = fake.check(*files(programs / "cpu"), 0, 1, "alone", tool=TOOL).splitlines()
    found, expected = ([json.loads(line) for line in lines] for lines in (printed, alone))
    assert [found[0], found[1]] == [expected[0], expected[1]]
    for tokens, whole in zip(found[2:], expected[2:], strict=True):
        assert 0 < len(tokens) < len(whole) and tokens == whole[: len(tokens)]


@pytest.mark.timeout(FAULTS_TIMEOUT)
def test_every_call_fails_in_turn_under_sanitizers(sanitized, programs) -> None:
    # A multiple of 3 from the third on: of those that the others leave out.
    faults(sanitized, programs / "cuda", True, 21, 3)


SCRIPT = """
import json, select, sys
from et_moe.serving.engine import load_engine
from et_moe.serving.interface import EngineBrokenError, SamplingParams

engine = load_engine(sys.argv[1], max_sequences=3)
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
ids = []
try:
    for prompt in json.loads(sys.argv[2]):
        ids.append(engine.submit(prompt, params))
except EngineBrokenError:
    pass  # the first may break it before the last is there
tokens, ends = {i: [] for i in ids}, {}
while len(ends) < len(ids):
    assert select.select([engine.fileno()], [], [], 300)[0]
    for event in engine.take_events():
        tokens[event.request_id] += event.token_ids
        if event.finish_reason:
            ends[event.request_id] = event.error or event.finish_reason
try:
    engine.submit([1], params)
    refused = None
except EngineBrokenError as error:
    refused = str(error)
broken = engine.status().broken
engine.close()
print(json.dumps([list(tokens.values()), list(ends.values()), refused, broken]))
"""


def python(fake, program: Path, **environment: str) -> list:
    """Runs the script over the fake driver, and returns what it prints."""
    done = fake.run(
        Path(sys.executable),
        *("-c", SCRIPT, program, json.dumps(PROMPTS)),
        **environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def build_of_the_extension(build_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("ET_MOE_BUILD_DIR", str(build_dir))


@pytest.mark.timeout(900)
def test_executed_tokens_of_the_extension_are_those_of_the_cpu(fake, programs) -> None:
    """The program's code finds the functions that it calls in an extension that Python loaded."""
    sidecar = str(programs / "cuda/kernels.json")
    found = python(fake, programs / "cuda", execute=sidecar)
    expected = python(fake, programs / "cpu")
    assert found == expected and found[1:] == [["length"] * 3, None, None]
    report = fake.report()
    assert not report["violations"] and not report["leaks"]


def test_a_device_that_failed_for_good(fake, programs) -> None:
    _, ends, refused, broken = python(
        fake,
        programs / "cuda",
        fail="cudaGraphLaunch:1",
        error="cudaErrorIllegalAddress",
    )
    assert ends and all(
        "cudaErrorIllegalAddress" in end or "ILLEGAL_ADDRESS" in end for end in ends
    )
    assert refused == broken and "with a fresh state" in broken


RELOAD = """
import select, sys
from et_moe.serving.engine import load_engine
from et_moe.serving.interface import SamplingParams

for program in sys.argv[1:]:
    engine = load_engine(program, max_sequences=1)
    engine.submit([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    ended = False
    while not ended:
        assert select.select([engine.fileno()], [], [], 60)[0]
        ended = any(event.finish_reason for event in engine.take_events())
    engine.close()
"""


def test_a_process_that_loads_one_program_after_the_other(fake, programs) -> None:
    """Each program runs its own code, even if that of the first is still in the process."""

    def launches(*names: str) -> Counter:
        done = fake.run(Path(sys.executable), "-c", RELOAD, *(programs / name for name in names))
        assert done.returncode == 0, done.stderr
        return Counter(fake.report()["launches"])

    both = launches("cuda", "next/cuda")
    assert both == launches("cuda") + launches("next/cuda")
