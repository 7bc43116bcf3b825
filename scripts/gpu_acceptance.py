"""Tests and measures the project on a GPU; `gpu_acceptance.sh` calls it.

A step is run whether or not those before it failed. It has time of its own, and the time that the
steps before it did not need. The report says for each step whether it `passed`, `failed` or was
`not run`, with what was found.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer
from acceptance_models import MANIFEST, Model, Program, check_model
from acceptance_session import (
    REPO,
    NotRun,
    OutOfTime,
    Session,
    Step,
    StepFailed,
    run_steps,
)
from acceptance_tokens import check_same_tokens
from rich.console import Console
from rich.table import Table

from et_moe.benchmarks.result import describe_gpu, provenance

KERNEL_TESTS = "tests/backends/cuda/triton"
QUICK_TESTS = 4
"""With --quick every n-th test is run."""
MODES = {"eager": (), "graphs": ("--cuda_graph",)}
"""Ways to run a program, and the runner's flags for them."""


def junit_counts(path: Path) -> dict:
    """The counts of a JUnit file, and the names of the tests that failed."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors")}
    skipped = sum(int(s.get("skipped", 0)) for s in suites)
    bad = counts["failures"] + counts["errors"]
    cases = (case for suite in suites for case in suite.iter("testcase"))
    failing = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - bad - skipped
    return {"passed": passed, "failed": bad, "skipped": skipped, "failing": failing[:30]}


def kernel_tests(session: Session) -> dict:
    """Runs the tests of every op's kernels on the GPU."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    chosen = [KERNEL_TESTS]
    if session.quick:
        output = session.run([*pytest, "--collect-only", *chosen])
        tests = [line for line in output.splitlines() if line.startswith(KERNEL_TESTS)]
        if not tests:
            raise StepFailed(f"{KERNEL_TESTS}: no tests found")
        listing = session.scratch / "tests.txt"
        listing.write_text("\n".join(tests[::QUICK_TESTS]))
        chosen = [f"@{listing}"]
    results = session.scratch / "tests.xml"
    workers = min(12, os.cpu_count() or 1)
    late = None
    try:
        session.call([*pytest, "-n", str(workers), f"--junitxml={results}", *chosen])
    except OutOfTime:
        late = "out of time"
    if not results.is_file():
        raise StepFailed(late or "pytest wrote no results")
    counts = junit_counts(results)
    if late or counts["failed"] or not counts["passed"]:
        said = f"{counts['passed']} tests passed, {counts['failed']} failed"
        raise StepFailed(f"{late}: {said}" if late else said, counts)
    return counts


def open_program(session: Session, name: str, mode: str) -> Program:
    """A packed program, as a key of `MODES` says it is run."""
    folder = session.folder / "models" / name
    return Program(session.run, session.runner, folder, session.scratch, MODES[mode])


def models(session: Session) -> dict:
    """Compares every model, with and without CUDA graphs, with the CPU's results."""
    found: list[dict] = []
    try:
        for model in map(Model.from_json, session.manifest["models"]):
            cases = model.cases[1:3] if session.quick else model.cases
            for mode in MODES:
                program = open_program(session, model.name, mode)
                for check in check_model(program, model, cases):
                    found.append({"model": model.name, "mode": mode, **check})
    except OutOfTime:
        raise StepFailed(f"out of time after {len(found)} checks", {"checks": found}) from None
    wrong = [f"{c['model']}, {c['mode']}: {c['error']}" for c in found if c["error"]]
    if wrong or not found:
        message = f"{len(wrong)} of {len(found)} checks failed; {'; '.join(wrong[:3])}"
        raise StepFailed(message, {"checks": found})
    return {"checks": found}


def same_tokens(session: Session) -> dict:
    """Compares tokens alone with those in batches, with drafts and with a prefix cache."""
    found: list[dict] = []
    for entry, mode in itertools.product(session.manifest["same_tokens"], MODES):
        program, drafting = (
            open_program(session, entry[name], mode) for name in ("model", "drafting")
        )
        given = (entry[name] for name in ("prompts", "accepts", "shared"))
        for check in check_same_tokens(program, drafting, *given):
            found.append({"model": entry["model"], "mode": mode, **check})
    wrong = [f"{c['model']}, {c['mode']}, {c['check']}: {c['error']}" for c in found if c["error"]]
    if wrong or not found:
        raise StepFailed("; ".join(wrong) or "no tokens were compared", {"checks": found})
    return {"checks": found}


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, on the PATH or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{home}/bin")


def sanitize(session: Session) -> dict:
    """Runs prompts and some decoded tokens of the first model under compute-sanitizer: steps of
    three sequences, then of one."""
    tool = find_sanitizer()
    if tool is None:
        raise NotRun("compute-sanitizer is not installed")
    model = Model.from_json(session.manifest["models"][0])
    ids = next(case.prompt_ids for case in model.cases if len(case.prompt_ids) > 16)
    prompts = session.scratch / "sanitized.jsonl"
    requests = [{"prompt_ids": ids[i:], "max_new_tokens": 3 if i else 5} for i in range(3)]
    prompts.write_text("".join(json.dumps(request) + "\n" for request in requests))
    runs = [("memcheck", "graphs")]
    if not session.quick:
        runs += [("memcheck", "eager"), ("racecheck", "eager")]
    found, wrong = [], []
    for check, mode in runs:
        program = open_program(session, model.name, mode)
        flags = (f"--prompts_path={prompts}", f"--output_ids_path={session.scratch / 'ids.json'}")
        command = [tool, f"--tool={check}", "--error-exitcode=86", *program.command(*flags)]
        try:
            code, output = session.call(command)
        except OutOfTime:
            raise StepFailed(f"out of time in {check}, {mode}", {"runs": found}) from None
        summary = [line.strip("= ") for line in output.splitlines() if " SUMMARY: " in line]
        found.append({"tool": check, "mode": mode, "exit_code": code, "summary": summary})
        if code or not summary:
            wrong.append(f"{check}, {mode}: exit code {code}, {summary or output[-300:]}")
    if wrong:
        raise StepFailed("; ".join(wrong), {"runs": found})
    return {"runs": found}


def _benchmark(session: Session, name: str, *flags: str | Path) -> tuple[dict, str]:
    """The result and the output of a command of `et_moe.benchmarks`."""
    out = session.scratch / f"{name}.json"
    command = [sys.executable, "-m", "et_moe.benchmarks", name, *flags, "--out", out]
    try:
        code, output = session.call(command)
    except OutOfTime:
        code, output = -1, "out of time"
    found = json.loads(out.read_text()) if out.is_file() else {}
    found.pop("command", None)  # it names temporary folders, and the log has it
    if code or not found:
        raise StepFailed(f"{name}: exit code {code}: {output.strip()[-600:]}", found)
    return found, output


def kernel_benchmark(session: Session) -> dict:
    """Compares the kernels with the wheel's, for a few numbers of tokens."""
    tokens = "1,1024" if session.quick else "1,16,128,1600"
    flags = ("--tokens", tokens, "--seconds", f"{max(session.left() - 10, 1):.0f}")
    found, output = _benchmark(session, "kernels", *flags)
    broken = [r for r in found["rows"] if "error" in r and not r["peer"]]
    if broken:
        first = broken[0]
        what = f"{first['kernel']} at M = {first['m']}: {first['error']}"
        raise StepFailed(f"{len(broken)} measurements failed; {what}", found)
    if "stopped after" in output:
        raise StepFailed("out of time: some kernels were not measured", found)
    return found


def demo_benchmark(session: Session) -> dict:
    """Measures the stats of the demo model, and a profile of its kernels."""
    program = session.folder / "models/demo-bfloat16"
    found, _ = _benchmark(
        session,
        "e2e",
        *("--program", f"int8={program}", "--runner", session.runner),
        *("--model-dir", REPO / "examples/qwen3_5_moe/demo_checkpoint"),
        *("--prompts", "128" if session.quick else "128,512", "--new-tokens", "64"),
        *("--warmup", "2", "--num-iters", "3", "--profile-prompt", "128"),
    )
    return found


# Together they have 8 minutes, and less than 4 with --quick, as a step that is stopped may take
# 10 s to end. First come those that leave most of their time to the kernel tests, which spend much
# time on compiling.
STEPS = (
    Step("models", models, (80, 40)),
    Step("same tokens", same_tokens, (60, 30)),
    Step("compute-sanitizer", sanitize, (60, 20)),
    Step("kernel tests", kernel_tests, (190, 90)),
    Step("kernel benchmark", kernel_benchmark, (70, 35)),
    Step("demo benchmark", demo_benchmark, (50, 25)),
)


def summary(report: dict) -> Table:
    """A table with a line for each step."""
    table = Table("step", "outcome", "s", "what")
    for step in report["steps"]:
        table.add_row(step["name"], step["status"], f"{step['seconds']:.0f}", step["reason"] or "")
    return table


def main(
    folder: Annotated[Path, typer.Argument(help="Made by pack_acceptance.sh.")],
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything.")] = False,
) -> None:
    """Runs all steps; exits with 1 if one failed."""
    console = Console(width=150)
    folder = folder.resolve()
    manifest = json.loads((folder / MANIFEST).read_text())
    if describe_gpu() is None:
        console.print("error: no NVIDIA GPU found: nvidia-smi does not name one")
        raise typer.Exit(1)
    results = folder / "results"
    results.mkdir(exist_ok=True)
    command = f"scripts/gpu_acceptance.sh {'--quick ' * quick}{folder}"
    report = provenance(command) | {"status": "incomplete", "quick": quick}
    report["packed"] = {k: v for k, v in manifest.items() if k not in ("models", "files")}
    log, path = results / "log.txt", results / "acceptance.json"
    log.write_text(f"{json.dumps(report)}\n")
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(folder, manifest, Path(scratch), log, quick, deadline=0)
        if not os.access(session.runner, os.X_OK):  # a copy may have lost its permission
            session.runner.chmod(0o755)
        run_steps(STEPS, session, report, path)
    console.print(summary(report))
    console.print(f"{report['status']}: {path}, {log}")
    raise typer.Exit(report["status"] != "passed")


if __name__ == "__main__":
    typer.run(main)
