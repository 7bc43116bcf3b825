"""The CUDA delegate by ExecuTorch's API alone, over the fake driver: no runner takes part.

The programs have two methods of a small model (tests/backends/cuda/lowering_methods.py): `decode`,
and `scores`, which takes `count` and `ids` and returns logits alone.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

TOOL = "fake_cuda/executorch_check"
DECODE = json.dumps({"tokens": [7], "positions": [3], "slots": [0]})
SCORES = json.dumps({"count": [5], "ids": [7, 1, 250, 9, 31], "slots": [0]})


@pytest.fixture
def small(programs: Path) -> Path:
    return programs / "small"


def cpu_outputs(build_dir: Path, *command) -> list:
    done = subprocess.run(
        [build_dir / "tests" / TOOL, *map(str, command)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(found: dict, expected: dict) -> None:
    """Checks that outputs agree. With other weights, logits would differ by more than their own
    norm."""
    assert set(found) == set(expected)
    assert found.get("token") == expected.get("token")
    logits, others = np.array(found["logits"]), np.array(expected["logits"])
    # The tolerance is that of bf16.
    assert np.linalg.norm(logits - others) < 0.05 * np.linalg.norm(others)


def test_a_method_without_a_hand_over_returns_all_its_outputs(fake, small, build_dir) -> None:
    command = ("scores", SCORES, SCORES, json.dumps({"count": [2], "ids": [9, 8], "slots": [0]}))
    sidecar = str(small / "kernels.json")
    printed = fake.check(
        "run", small / "cuda.pte", small / "cuda.0.ptd", *command, tool=TOOL, execute=sidecar
    )
    expected = cpu_outputs(build_dir, "run", small / "cpu.pte", small / "cpu.0.ptd", *command)
    found = [json.loads(line) for line in printed.splitlines()]
    assert len(found) == len(expected) == 3 and set(found[0]) == {"logits"}
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def rows(count: int, offsets: int | None = None) -> str:
    """Inputs of the method `rows`."""
    tokens = [7 * i % 200 for i in range(count)]
    return json.dumps({"tokens": tokens, "offsets": list(range(offsets or count))})


def test_sizes_of_several_inputs_and_of_outputs_vary(fake, programs, build_dir) -> None:
    """Calls have one row, or sizes at the ends of each range; 3, 15 and 33 rows are padded."""
    folder, counts = programs / "rows", (1, 2, 3, 15, 16, 17, 33, 63, 64)
    files = [[folder / f"{kind}.pte", folder / f"{kind}.0.ptd"] for kind in ("cuda", "cpu")]
    command = ("rows", *map(rows, counts))
    sidecar = str(folder / "kernels.json")
    printed = fake.check("run", *files[0], *command, tool=TOOL, execute=sidecar)
    found = [json.loads(line) for line in printed.splitlines()]
    expected = cpu_outputs(build_dir, "run", *files[1], *command)
    for count, one, other in zip(counts, found, expected, strict=True):
        assert len(one["token"]) == count
        assert_same(one, other)


def test_sizes_must_agree(fake, programs) -> None:
    pte, ptd = programs / "rows/cuda.pte", programs / "rows/cuda.0.ptd"
    printed = fake.check("run", pte, ptd, "rows", rows(3, offsets=2), tool=TOOL)
    assert json.loads(printed) == {"at": "execute", "error": "Error::InvalidArgument"}


def test_programs_have_their_own_weights_and_state(fake, small, build_dir) -> None:
    """The first two programs differ in weights alone, and the third is the first once more."""

    def command(backend: str) -> tuple:
        weights = [small / f"{backend}.{seed}.ptd" for seed in (0, 1, 0)]
        return ("programs", small / f"{backend}.pte", "decode", DECODE, *weights)

    sidecar = str(small / "kernels.json")
    printed = fake.check(*command("cuda"), tool=TOOL, execute=sidecar)
    found = [json.loads(line) for line in printed.splitlines()]
    expected = cpu_outputs(build_dir, *command("cpu"))
    for calls, others in zip(found, expected, strict=True):
        for one, other in zip(calls, others, strict=True):
            assert_same(one, other)
    assert found[2] == found[0] and found[1] != found[0]
    assert found[0][0] != found[0][1], "calls do not continue one sequence"


def test_programs_under_sanitizers(sanitized, small) -> None:
    weights = [small / f"cuda.{seed}.ptd" for seed in (0, 1, 0)]
    sanitized.check("programs", small / "cuda.pte", "decode", DECODE, *weights, tool=TOOL)


def failure(
    fake, small: Path, method: str, pte: str = "cuda.pte", ptd: str = "cuda.0.ptd", **environment
) -> tuple[str | None, str]:
    """Where the first call of a method failed, and with which code of ExecuTorch."""
    inputs = DECODE if method == "decode" else SCORES
    printed = fake.check("run", small / pte, small / ptd, method, inputs, tool=TOOL, **environment)
    (answer,) = (json.loads(line) for line in printed.splitlines())
    return answer.get("at"), answer.get("error", "").removeprefix("Error::")


@pytest.mark.parametrize("method", ["decode", "scores"])
def test_out_of_memory_has_its_own_code(fake, small, method: str) -> None:
    """Each allocation fails in turn: that of weights at load, then those of state, inputs and
    scratch memory."""
    found = []
    for function in ("cudaMalloc", "cudaHostAlloc"):
        count = 0
        while True:
            count += 1
            at, code = failure(fake, small, method, fail=f"{function}:{count}")
            if at is None:
                break
            assert code == "MemoryAllocationFailed"
            found.append((function, at))
    assert found.count(("cudaMalloc", "load")) == 1
    assert found.count(("cudaMalloc", "execute")) == 3
    assert ("cudaHostAlloc", "load") in found and ("cudaHostAlloc", "execute") in found
    assert failure(fake, small, method, memory="1000") == ("load", "MemoryAllocationFailed")
    error = {"fail": "cuModuleLoadData:1", "error": "cudaErrorMemoryAllocation"}
    assert failure(fake, small, method, **error) == ("execute", "MemoryAllocationFailed")


@pytest.mark.parametrize(
    ("environment", "at", "code"),
    [
        ({"devices": "0"}, "load", "NotFound"),
        ({"driver": "12040"}, "load", "NotSupported"),
        ({"arch": "sm_80"}, "load", "NotSupported"),
        ({"fail": "cuModuleLoadData:1"}, "execute", "NotSupported"),  # no binary for this GPU
        ({"fail": "cudaStreamCreateWithFlags:1"}, "load", "Internal"),
        ({"fail": "cuLaunchKernel:2"}, "execute", "Internal"),
        ({"fail": "cudaMemcpyAsync:1", "error": "cudaErrorIllegalAddress"}, "load", "Internal"),
    ],
)
def test_codes_of_other_failures(fake, small, environment: dict, at: str, code: str) -> None:
    assert failure(fake, small, "decode", **environment) == (at, code)


def test_codes_of_weights_that_do_not_fit(fake, small, tmp_path) -> None:
    expected = ("load", "InvalidExternalData")
    assert failure(fake, small, "decode", ptd="cpu.0.ptd") == expected
    whole = (small / "cuda.0.ptd").read_bytes()
    for old, new in ((b"norm.weight", b"norm.veight"), (b"experts-", b"expertz-")):
        assert old in whole
        (tmp_path / "other.ptd").write_bytes(whole.replace(old, new))
        assert failure(fake, small, "decode", ptd=tmp_path / "other.ptd") == expected


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b'"format": 5', b'"format": 4', "DelegateInvalidCompatibility"),
        (b'"prepack"', b'"prepak"', "InvalidProgram"),
        (b'"hand_over": {"token": "token"', b'"hand_over": {"token": "logit"', "InvalidProgram"),
        (b'"min_shape": [1, 2]', b'"min_shape": [0, 2]', "InvalidProgram"),
        (b'"longest": 64', b'"longest": 63', "InvalidProgram"),
        (b'"longest": 16', b'"longest": 64', "InvalidProgram"),
        (b'"data": "decode.sm_90.1"', b'"data": "decode.sm_90.2"', "InvalidProgram"),
        (b'"sha256"', b'"sha255"', "InvalidProgram"),
        (b"AOTInductorModelContainerDelete", b"AOTInductorModelContainerDelate", "InvalidProgram"),
    ],
)
def test_codes_of_programs_that_do_not_fit(
    fake, small, tmp_path, old: bytes, new: bytes, code: str
) -> None:
    """A program may be of another version, damaged, with two dimensions that vary, for other
    lengths, without code that it names, or with other code."""
    whole = (small / "cuda.pte").read_bytes()
    assert old in whole
    (tmp_path / "other.pte").write_bytes(whole.replace(old, new.ljust(len(old))))
    method = "scores" if b"min_shape" in old or b"longest" in old else "decode"
    assert failure(fake, small, method, pte=tmp_path / "other.pte") == ("load", code)


def test_code_of_a_call_that_does_not_fit(fake, small) -> None:
    printed = fake.check(
        *("run", small / "cuda.pte", small / "cuda.0.ptd", "scores"),
        json.dumps({"count": [1], "ids": [7], "slots": [0]}),
        tool=TOOL,
    )
    assert json.loads(printed) == {"at": "execute", "error": "Error::InvalidArgument"}
