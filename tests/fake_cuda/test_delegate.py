"""The runner and its CUDA delegate over the fake driver (see fake_cuda.h), with real programs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from file_fuzzer import FileFuzzer

from et_moe.backends.cuda.build import RUNTIME_FUNCTIONS
from et_moe.backends.sealed_file import MAGIC, write_sealed

CAPTURE = pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
# This prompt takes two calls: one of 20 tokens, with the kernels for many tokens, and one of 3,
# which is padded, with the kernels for a few.
LONG = [5, 77, 130, 9, 31, 64, 250, 3, 8, 19, 20, 33, 41, 57, 101, 99, 5, 6, 7, 12, 18, 200, 1]
SHORT = [9, 8]
TRAILER = 24


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


@pytest.mark.parametrize("threads", [0, 1])
def test_weights_are_copied_by_fewer_threads(fake, programs, build_dir, monkeypatch, threads):
    """The weights are copied even where the system refuses to start more threads."""
    monkeypatch.setenv("ET_MOE_TEST_THREADS", str(threads))
    library = build_dir / "tests/libfew_threads.so"
    done = fake.runner(programs / "cuda", *flags(SHORT, 2), preload=library)
    assert done.returncode == 0, done.stderr
    assert not fake.report()["violations"] and not fake.report()["leaks"]


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
    failed = [line for line in printed if re.search("cudaError|CUDA_ERROR_", line)]
    assert len(failed) > len(printed) / 2


@CAPTURE
@pytest.mark.timeout(900)
def test_every_call_fails_in_turn_under_sanitizers(sanitized, programs, graph: bool) -> None:
    sanitized.check("faults", *files(programs / "cuda"), int(graph), 3)


@CAPTURE
def test_runner_says_what_failed(fake, programs, graph: bool) -> None:
    """The first call of each CUDA function fails, in the runner itself."""
    arguments = flags(SHORT, 4, graph)
    assert fake.runner(programs / "cuda", *arguments).returncode == 0
    failed = 0
    for name in fake.report()["calls_by_name"]:
        done = fake.runner(programs / "cuda", *arguments, fail=f"{name}:1")
        report = fake.report()
        assert report["failed"] == name and not report["leaks"] and not report["violations"]
        if done.returncode:
            assert done.returncode == 1, f"{name}: {done.stderr}"
            named = re.search(r"^error: .*(cudaError|CUDA_ERROR_)\w+", done.stderr, re.MULTILINE)
            assert named, done.stderr
            failed += 1
    assert failed > 10


@pytest.mark.parametrize(
    ("error", "driver_error"),
    [
        ("cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED"),
    ],
)
def test_errors_that_end_the_context(fake, programs, error: str, driver_error: str) -> None:
    for call, name in (("cuLaunchKernel:5", driver_error), ("cudaStreamSynchronize:2", error)):
        done = fake.runner(programs / "cuda", *flags(SHORT, 4), fail=call, error=error)
        assert done.returncode == 1 and name in done.stderr


@CAPTURE
@pytest.mark.timeout(900)
def test_executed_tokens_are_those_of_the_cpu(fake, programs, build_dir, graph: bool) -> None:
    """There is a warm-up, so that the printed tokens come from a session that was reset."""
    sidecar = str(programs / "cuda/kernels.json")
    done = fake.runner(programs / "cuda", *flags(LONG, 4, graph), "--warmup=1", execute=sidecar)
    assert done.returncode == 0, done.stderr
    assert tokens(done.stdout) == cpu_tokens(build_dir, programs, LONG, 4)


@CAPTURE
@pytest.mark.parametrize(
    ("length", "few", "many"),
    [(2, 1, 0), (15, 1, 0), (16, 1, 0), (17, 0, 1), (19, 0, 1), (20, 0, 1), (23, 1, 1), (37, 0, 2)],
)
def test_calls_run_the_code_of_their_range(
    fake, programs, graph: bool, length: int, few: int, many: int
) -> None:
    """A prompt takes calls of at most 20 tokens; up to 4 and to 16 have kernels of their own. The
    first run is eager, the second one is captured, the third is a launch of the same graph."""
    prompt = [1 + i % 200 for i in range(length)]
    done = fake.runner(programs / "cuda", *flags(prompt, 1, graph), "--num_iters=3")
    assert done.returncode == 0, done.stderr
    report = fake.report()
    layers, found = 2, report["launches"]
    of_few = "_decode_gate_up_kernel" if length in (2, 23) else "_few_gate_up_kernel"
    assert found.get(of_few, 0) == 3 * few * layers
    assert found.get("_gate_up_kernel", 0) == 3 * many * layers
    graphs = report["calls_by_name"].get("cudaGraphInstantiate", 0)
    assert graphs == (few + many if graph and length != 37 else graph)


@pytest.mark.timeout(900)
def test_executed_tokens_around_the_boundaries(fake, programs, build_dir) -> None:
    """Lengths at the ends of both ranges, some of which are padded and some not."""
    prompts = [[*LONG, *LONG][:length] for length in (3, 15, 16, 17, 19, 36)]
    printed = fake.check(
        *("sessions", *files(programs / "cuda"), 0, 1, *map(json.dumps, prompts)),
        execute=str(programs / "cuda/kernels.json"),
    )
    expected = [cpu_tokens(build_dir, programs, prompt, 1) for prompt in prompts]
    assert [json.loads(line) for line in printed.splitlines()] == expected


@pytest.mark.timeout(900)
def test_executed_tokens_with_float16_scales_of_qwen3_next(fake, programs, build_dir) -> None:
    sidecar = str(programs / "next/cuda/kernels.json")
    done = fake.runner(programs / "next/cuda", *flags(SHORT, 3), execute=sidecar)
    assert done.returncode == 0, done.stderr
    assert tokens(done.stdout) == cpu_tokens(build_dir, programs / "next", SHORT, 3)
    assert fake.report()["launches"]["_embedding_w4_kernel"] > 0


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
    # The second time another token was appended to what it had gone on with.
    further = cpu_tokens(build_dir, programs, [*SHORT, *expected, SHORT[0]], 1)
    assert [json.loads(line) for line in printed.splitlines()] == [expected, expected + further]


SCRIPT = [
    {"score": [5, 77, 130]},
    {"generate": SHORT, "max_new_tokens": 6, "stop_after": 3},
    {"append": [41, 57, 101], "max_new_tokens": 2},
    {"append": [7], "max_new_tokens": 3, "temperature": 0.7, "seed": 5},
]
"""The callback ends a generation while the next token is on its way, and more is fed behind it."""


def engine(fake, program: Path, script: list[dict], *flags: str, **environment) -> list[dict]:
    printed = fake.check(
        *(*files(program), *flags),
        tool="runner/engine_check",
        stdin="".join(json.dumps(command) + "\n" for command in script),
        **environment,
    )
    return [json.loads(line) for line in printed.splitlines()]


@CAPTURE
@pytest.mark.timeout(900)
def test_executed_sequences_go_on_where_they_stopped(fake, programs, graph: bool) -> None:
    options = ["--cuda_graph"] if graph else []
    sidecar = str(programs / "cuda/kernels.json")
    found = engine(fake, programs / "cuda", SCRIPT, *options, execute=sidecar)
    expected = engine(fake, programs / "cpu", SCRIPT)
    assert found[1:] == expected[1:]
    assert [answer["finish"] for answer in found[1:]] == ["callback", "length", "length"]
    np.testing.assert_allclose(found[0]["logprobs"], expected[0]["logprobs"], atol=1e-3)


def test_calls_run_ahead_after_logits_were_asked_for(fake, programs) -> None:
    """If a callback ends a generation, nobody asks for the result of the call that was made
    ahead."""

    def calls(**generate) -> dict[str, int]:
        script = [{"score": LONG[:4]}, {"generate": SHORT, **generate}]
        engine(fake, programs / "cuda", script, "--cuda_graph")
        return fake.report()["calls_by_name"]

    stopped, ended = calls(max_new_tokens=9, stop_after=6), calls(max_new_tokens=6)
    assert stopped["cudaEventRecord"] == ended["cudaEventRecord"] + 1
    # Logits were copied only for the three scored tokens; for the prompt, a token was.
    few, many = calls(max_new_tokens=4), calls(max_new_tokens=9)
    assert many["cudaMemcpyAsync"] == few["cudaMemcpyAsync"]
    assert many["cudaStreamSynchronize"] == few["cudaStreamSynchronize"]


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


@CAPTURE
@pytest.mark.timeout(900)
def test_executed_windows_are_those_of_the_cpu(fake, programs, tmp_path, graph: bool) -> None:
    """Through `score`: whole calls of 4 tokens, and one of 2 with padding behind."""
    ids, logits = tmp_path / "ids.json", [tmp_path / "cuda.npy", tmp_path / "cpu.npy"]
    ids.write_text(json.dumps([LONG[:9], LONG[9:12]]))
    for program, path in zip(("cuda", "cpu"), logits, strict=True):
        done = fake.runner(
            programs / "next" / program,
            *(f"--score_ids_path={ids}", f"--logits_path={path}"),
            *(["--cuda_graph"] if graph else []),
            execute=str(programs / "next/cuda/kernels.json"),
        )
        assert done.returncode == 0, done.stderr
        assert program == "cpu" or fake.report()["launches"]["_choose_kernel"] == 3
    cuda, cpu = map(np.load, logits)
    assert cuda.shape == (10, 264)
    assert np.linalg.norm(cuda - cpu) < 1e-4 * np.linalg.norm(cpu)


def test_another_delegate_in_the_process(fake, programs, tmp_path) -> None:
    """Another delegate may bring the functions that AOTInductor's code usually calls; our code has
    its own."""
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
    refused(fake, program, "this GPU is sm_75", "sm_90", "--backend cpu", arch="sm_75")
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


@pytest.mark.parametrize("kind", ["host program", "kernel"])
def test_a_program_that_was_tampered_with(fake, programs, tmp_path, kind: str) -> None:
    """The program is sealed again, so that only the code's own digest is wrong."""
    data = bytearray((programs / "cuda/model.pte").read_bytes()[:-TRAILER])
    # The number that an ELF header has for its machine: EM_X86_64 or EM_CUDA.
    machine = {"host program": b"\x3e\x00", "kernel": b"\xbe\x00"}[kind]
    files = (m.start() for m in re.finditer(rb"\x7fELF", data))
    data[next(at for at in files if data[at + 18 : at + 20] == machine) + 1000] ^= 1
    write_sealed(tmp_path / "model.pte", bytes(data))
    refused(fake, tmp_path, "digest mismatch", "not be run", ptd=programs / "cuda/model.ptd")


def test_weights_that_do_not_fit(fake, programs, tmp_path) -> None:
    program = programs / "cuda"
    refused(fake, program, "cpu/model.ptd", "do not fit each other", ptd=programs / "cpu/model.ptd")
    refused(fake, program, "missing.ptd", ptd=tmp_path / "missing.ptd")
    data = (program / "model.ptd").read_bytes()
    assert data.count(b"experts-") == 1 and MAGIC in data
    other = tmp_path / "other.ptd"
    changed = data[:-TRAILER].replace(b"experts-", b"expertz-")
    other.write_bytes(FileFuzzer("ptd", data).seal(changed))
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
        assert [t["name"] for t in method["outputs"]] == ["token", "logits"]
        assert [t["name"] for t in method["state"]] and len(method["weights"]) > 30
    printed = run(pte)
    assert printed.returncode == 0
    assert "_decode_gate_up_kernel" in printed.stdout and "get_max_seq_len: 80" in printed.stdout
    assert " bits a weight, " in printed.stdout.splitlines()[-1]
    rows = [" ".join(re.findall(r"[^\s│]+", line)) for line in printed.stdout.splitlines()]
    for row in (
        "prefill input tokens int64 [1, 2..20]",
        "prefill output token int64 [1, 1]",
        "decode input tokens (next: token) int64 [1, 1]",
        "decode input positions (next: + 1) int64 [1]",
        "decode output token (handed over) int64 [1, 1]",
    ):
        assert row in rows
    state = {"cuda": ("slots float32 2",), "next/cuda": ("slots bfloat16 1", "slots float32 1")}
    for name, starts in state.items():
        printed = run(programs / name / "model.pte").stdout
        found = [" ".join(re.findall(r"[^\s│]+", line)) for line in printed.splitlines()]
        assert all(any(row.startswith(f"{start} ") for row in found) for start in starts)


def test_kernels_of_a_batch_start_early(programs) -> None:
    """The ranges of `decode_batch`; the first kernel may not, since it reads what others write."""
    kernels = json.loads((programs / "cuda/kernels.json").read_text())["decode_batch"]["sm_90"]
    state = {"_decode_kernel", "combine_kernel", "_step_kernel"}
    every = state | {"_choose_kernel", "_block_kernel", "_collect_kernel", "_finish_kernel"}
    gemm = {"quantize_rows_kernel", "_gemm_kernel", "_conv_step_kernel"}
    linear = ({"_gemv_loop_kernel"}, gemm)
    for launched, more in zip(kernels, linear, strict=True):
        dependent = {kernel["function"]: kernel["dependent"] for kernel in launched}
        for name in every | more:
            assert dependent[name], name
        assert not dependent["_embedding_kernel"]
