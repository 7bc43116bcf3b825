"""The runner and its CUDA delegate over the fake driver (see fake_cuda.h), with real programs.

The programs are a small model's (make_programs.py), exported once for all workers of a test run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from et_moe.backends.cuda.build import RUNTIME_FUNCTIONS
from et_moe.backends.sealed_file import MAGIC, write_sealed

FOLDER = Path(__file__).parent
CAPTURE = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
# Two calls of at most 16 tokens, the second one padded.
LONG, SHORT = [5, 77, 130, 9, 31, 64, 250, 3, 8, 19, 20, 33, 41, 57, 101, 99, 5, 6, 7], [9, 8]
TRAILER = 24


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """Folders `cpu` and `cuda` with one model's programs."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "fake_cuda_programs"
    with FileLock(base / "fake_cuda_programs.lock"):
        if not folder.exists():
            env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            env["PYTHONPATH"] = str(FOLDER.parent)
            command = [sys.executable, FOLDER / "make_programs.py", folder]
            subprocess.run(command, env=env, check=True)
    return folder


class Fake:
    """Runs a build's programs over its fake driver."""

    def __init__(self, build: Path, report: Path) -> None:
        self._build, self._report = build, report

    def run(
        self, *command, preload: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        """`environment`: of fake_cuda.h, without the prefix, in lower case."""
        env = {"LD_PRELOAD": str(preload)} if preload else {}
        env |= {f"ET_MOE_FAKE_CUDA_{k.upper()}": v for k, v in environment.items()}
        env |= {"LD_LIBRARY_PATH": str(self._build / "tests/fake_cuda")}
        env |= {"ET_MOE_FAKE_CUDA_REPORT": str(self._report)}
        return subprocess.run(
            [self._build / command[0], *map(str, command[1:])],
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def runner(self, program: Path, *flags, ptd: Path | None = None, **environment):
        files = ("--model_path", program / "model.pte", "--data_path", ptd or program / "model.ptd")
        return self.run("runner/qwen3_5_moe_runner", *files, *flags, **environment)

    def check(self, *command, **environment: str) -> str:
        """Output of delegate_check, which must succeed."""
        done = self.run("tests/fake_cuda/delegate_check", *command, **environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def report(self) -> dict:
        return json.loads(self._report.read_text())


@pytest.fixture
def fake(build_dir: Path, tmp_path: Path) -> Fake:
    return Fake(build_dir, tmp_path / "report.json")


@pytest.fixture
def sanitized(tmp_path: Path) -> Fake:
    """Built with AddressSanitizer and UBSan: the preset `sanitize`, see scripts/test.sh."""
    default = FOLDER.parent.parent / "build" / "sanitize"
    folder = Path(os.environ.get("ET_MOE_SANITIZE_BUILD_DIR", default))
    if not folder.is_dir():
        pytest.fail(f"{folder}: no build found; run scripts/test.sh")
    return Fake(folder, tmp_path / "report.json")


def files(program: Path) -> tuple[Path, Path]:
    return program / "model.pte", program / "model.ptd"


def flags(prompt: list[int], count: int, graph: bool = False) -> list[str]:
    ids = ",".join(map(str, prompt))
    options = [f"--prompt_ids={ids}", f"--max_new_tokens={count}", "--temperature=0"]
    return [*options, "--cuda_graph"] if graph else options


def tokens(stdout: str) -> list[int]:
    return [int(token) for token in stdout.splitlines()[0].split()]


def cpu_tokens(build_dir: Path, programs: Path, prompt: list[int], count: int) -> list[int]:
    pte, ptd = files(programs / "cpu")
    command = [build_dir / "runner/qwen3_5_moe_runner", "--model_path", pte, "--data_path", ptd]
    done = subprocess.run(
        [*command, *flags(prompt, count)], capture_output=True, text=True, check=True
    )
    return tokens(done.stdout)


@CAPTURE
def test_calls_obey_the_rules(fake, programs, graph: bool) -> None:
    done = fake.runner(programs / "cuda", *flags(LONG, 6, graph), "--num_iters=3")
    assert done.returncode == 0, done.stderr
    report = fake.report()
    assert not report["violations"] and not report["leaks"]
    assert sum(report["launches"].values()) > 100
    assert ("cudaGraphLaunch" in report["calls_by_name"]) == graph
    assert '"gpu_total_bytes":4294967296' in done.stdout + done.stderr


def test_a_decoded_token_is_one_launch_of_a_graph(fake, programs) -> None:
    def calls(count: int) -> dict[str, int]:
        done = fake.runner(programs / "cuda", *flags(SHORT, count, graph=True))
        assert done.returncode == 0, done.stderr
        return fake.report()["calls_by_name"]

    few, many = calls(8), calls(13)
    more = {name: many[name] - few[name] for name in many if many[name] != few[name]}
    expected = ("cudaGraphLaunch", "cudaEventRecord", "cudaEventSynchronize")
    assert more == dict.fromkeys(expected, 5)


@CAPTURE
@pytest.mark.timeout(900)
def test_every_call_fails_in_turn(fake, programs, graph: bool) -> None:
    printed = fake.check("faults", *files(programs / "cuda"), int(graph), 1).splitlines()
    assert len(printed) > 300
    # Tolerated are failures to release something, and of a capture.
    assert sum("cudaError" in line for line in printed) > len(printed) / 2


@CAPTURE
@pytest.mark.timeout(900)
def test_every_call_fails_in_turn_under_sanitizers(sanitized, programs, graph: bool) -> None:
    sanitized.check("faults", *files(programs / "cuda"), int(graph), 3)


@CAPTURE
def test_runner_says_what_failed(fake, programs, graph: bool) -> None:
    """The first call of each function, by the runner itself."""
    arguments = flags(SHORT, 4, graph)
    assert fake.runner(programs / "cuda", *arguments).returncode == 0
    failed = 0
    for name in fake.report()["calls_by_name"]:
        done = fake.runner(programs / "cuda", *arguments, fail=f"{name}:1")
        report = fake.report()
        assert report["failed"] == name and not report["leaks"] and not report["violations"]
        if done.returncode:
            assert done.returncode == 1, f"{name}: {done.stderr}"
            assert re.search(r"^error: .*cudaError\w+", done.stderr, re.MULTILINE), done.stderr
            failed += 1
    assert failed > 10


@pytest.mark.parametrize("error", ["cudaErrorIllegalAddress", "cudaErrorLaunchFailure"])
def test_errors_that_end_the_context(fake, programs, error: str) -> None:
    for call in ("cuLaunchKernel:5", "cudaStreamSynchronize:2"):
        done = fake.runner(programs / "cuda", *flags(SHORT, 4), fail=call, error=error)
        assert done.returncode == 1 and error in done.stderr


@CAPTURE
@pytest.mark.timeout(900)
def test_executed_tokens_are_those_of_the_cpu(fake, programs, build_dir, graph: bool) -> None:
    """After a warm-up: the printed tokens come from a session that was reset."""
    sidecar = str(programs / "cuda/kernels.json")
    done = fake.runner(programs / "cuda", *flags(LONG, 4, graph), "--warmup=1", execute=sidecar)
    assert done.returncode == 0, done.stderr
    assert tokens(done.stdout) == cpu_tokens(build_dir, programs, LONG, 4)


@pytest.mark.timeout(900)
def test_executed_sessions_do_not_see_each_other(fake, programs, build_dir) -> None:
    sidecar = str(programs / "cuda/kernels.json")
    prompts = [LONG, SHORT]
    printed = fake.check(
        "sessions", *files(programs / "cuda"), 1, 5, *map(json.dumps, prompts), execute=sidecar
    )
    expected = [cpu_tokens(build_dir, programs, prompt, 5) for prompt in prompts]
    assert [json.loads(line) for line in printed.splitlines()] == expected


@CAPTURE
@pytest.mark.timeout(900)
def test_a_session_that_runs_ahead(fake, programs, build_dir, graph: bool) -> None:
    printed = fake.check(
        "ahead",
        *files(programs / "cuda"),
        int(graph),
        *(5, json.dumps(SHORT)),
        execute=str(programs / "cuda/kernels.json"),
    )
    expected = cpu_tokens(build_dir, programs, SHORT, 5)
    assert [json.loads(line) for line in printed.splitlines()] == [expected] * 2


@pytest.mark.timeout(900)
def test_executed_logits_are_those_of_the_cpu(fake, programs, build_dir, tmp_path) -> None:
    ids, logits = tmp_path / "ids.json", [tmp_path / "cuda.npy", tmp_path / "cpu.npy"]
    ids.write_text(json.dumps(LONG[:4]))
    for program, path in zip(("cuda", "cpu"), logits, strict=True):
        done = fake.runner(
            programs / program,
            *(f"--score_ids_path={ids}", f"--logits_path={path}"),
            execute=str(programs / "cuda/kernels.json"),
        )
        assert done.returncode == 0, done.stderr
    cuda, cpu = map(np.load, logits)
    assert np.linalg.norm(cuda - cpu) < 1e-4 * np.linalg.norm(cpu)


def test_another_delegate_in_the_process(fake, programs, tmp_path) -> None:
    """It may bring the functions that AOTInductor's code usually calls; ours has its own."""
    (tmp_path / "other.c").write_text(
        "#include <stdlib.h>\n"
        + "".join(f"int {name}() {{ abort(); }}\n" for name in sorted(RUNTIME_FUNCTIONS))
    )
    library = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    done = fake.runner(programs / "cuda", *flags(SHORT, 3), preload=library)
    assert done.returncode == 0, done.stderr
    assert sum(fake.report()["launches"].values()) > 50


def refused(fake, program: Path, *parts: str, ptd: Path | None = None, **environment) -> None:
    done = fake.runner(program, *flags(SHORT, 2), ptd=ptd, **environment)
    assert done.returncode == 1, done.stderr
    assert not done.stdout and done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr


def test_gpus_that_do_not_fit(fake, programs) -> None:
    program = programs / "cuda"
    refused(fake, program, "this GPU is sm_80", "sm_90", "--cuda-arch sm_80", arch="sm_80")
    refused(fake, program, "driver supports CUDA 12.4", "13.0", driver="12040")
    refused(fake, program, "no GPU", devices="0")
    refused(fake, program, "too little GPU memory", "need", "free", memory=str(1 << 18))


def test_no_driver(programs, build_dir) -> None:
    pte, ptd = files(programs / "cuda")
    command = [build_dir / "runner/qwen3_5_moe_runner", "--model_path", pte, "--data_path", ptd]
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run([*command, *flags(SHORT, 2)], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no NVIDIA driver" in done.stderr and "--backend cpu" in done.stderr


def test_a_program_that_was_tampered_with(fake, programs, tmp_path) -> None:
    """Sealed again, so that only the code's own digest is wrong."""
    data = bytearray((programs / "cuda/model.pte").read_bytes()[:-TRAILER])
    data[data.rindex(b"\x7fELF") + 5000] ^= 1
    write_sealed(tmp_path / "model.pte", bytes(data))
    refused(fake, tmp_path, "digest mismatch", "not be run", ptd=programs / "cuda/model.ptd")


def test_weights_that_do_not_fit(fake, programs, tmp_path) -> None:
    program = programs / "cuda"
    refused(fake, program, "cpu/model.ptd", "another model", ptd=programs / "cpu/model.ptd")
    refused(fake, program, "missing.ptd", ptd=tmp_path / "missing.ptd")
    data = (program / "model.ptd").read_bytes()
    assert data.count(b"experts-") == 1 and MAGIC in data
    other = tmp_path / "other.ptd"
    other.write_bytes(data.replace(b"experts-", b"expertz-"))
    refused(fake, program, 'prepacked as "expertz-', "one version of et-moe", ptd=other)


def test_inspect(programs) -> None:
    pte = programs / "cuda/model.pte"
    command = [sys.executable, "-m", "et_moe.pipeline.cli", "inspect"]

    def run(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    description = json.loads(run(pte, "--json").stdout)
    assert description["backend"] == "EtMoeCudaBackend" and description["bytes"] > 1 << 20
    for method in description["methods"].values():
        assert list(method["code"]) == ["sm_90"]
        assert [t["name"] for t in method["state"]] and len(method["weights"]) > 30
    printed = run(pte)
    assert printed.returncode == 0
    assert "_decode_gate_up_kernel" in printed.stdout and "get_max_seq_len: 64" in printed.stdout
    refused = run(programs / "cpu/model.pte")
    assert refused.returncode == 1 and "not a program for CUDA" in refused.stderr
