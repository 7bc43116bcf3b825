"""Methods compiled for CUDA on this machine, whatever it has: the code and the `.pte`."""

import ast
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from files import made_once
from lowering_methods import (
    MAX_TOKENS,
    OWN_POOL,
    VOCABULARY,
    WEIGHTS,
    Columns,
    Pairs,
    Small,
    method,
    methods,
)

from et_moe.backends.cuda.backend import lower
from et_moe.backends.cuda.build import RUNTIME_FUNCTIONS
from et_moe.backends.cuda.gpu import gpu_for
from et_moe.backends.cuda.host_program import FIND_KERNEL, kernel_calls, run_body
from et_moe.backends.cuda.inspect import describe
from et_moe.backends.cuda.prepack import PREPACK_VERSION, plan_weights
from et_moe.backends.cuda.triton.tuning import find_config, tuning_target
from et_moe.backends.program_file import open_program

PROGRAM = Path(__file__).with_name("lowering_methods.py")
TESTS = PROGRAM.parents[2]
ARCHS = ("sm_90", "sm_80")
LONGEST = {"prefill": (4, 16, MAX_TOKENS), "decode": (1,)}
CODES = [f"{name}.{arch}.{n}" for arch in ARCHS for name, ends in LONGEST.items() for n in ends]


def _run(command: str, tmp_path_factory, **environment: str) -> Path:
    """Runs a command of `lowering_methods.py` once for all workers of a test run."""

    def make(folder: Path) -> None:
        (folder / "tmp").mkdir()
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = os.pathsep.join([str(TESTS), *filter(None, [env.get("PYTHONPATH")])])
        env |= {"TMPDIR": str(folder / "tmp"), "PYTHONPATH": path, **environment}
        subprocess.run([sys.executable, PROGRAM, command, folder], env=env, check=True)
        left = list((folder / "tmp").iterdir())
        assert not left, f"temporary files are left: {left}"

    return made_once(tmp_path_factory, f"lowering-{command}", make)


@pytest.fixture(scope="session")
def lowered(tmp_path_factory) -> Path:
    return _run("lower", tmp_path_factory)


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Path:
    """What is compiled in another process, with other hashes of strings: see `_alone` there."""
    return _run("alone", tmp_path_factory, PYTHONHASHSEED="123")


@pytest.fixture(scope="session")
def description(lowered) -> dict:
    return inspect((lowered / "model.pte").read_bytes())


def inspect(pte: bytes) -> dict:
    return describe(open_program(pte), len(pte))


def _source(lowered: Path, code: str) -> str:
    return (lowered / f"{code}.cpp").read_text()


def _entry(description: dict, code: str) -> dict:
    """What the program says of the code `code`, which is named by method, architecture and
    range."""
    name, arch, longest = code.split(".")
    return description["methods"][name]["code"][arch][LONGEST[name].index(int(longest))]


def _tool(*command: object) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("code", CODES)
def test_only_kernels_are_called(lowered, code):
    body = run_body(_source(lowered, code))
    assert not re.findall(r"aoti_torch_(cuda|cpu)_|proxy_executor_call|call_dispatcher", body)
    assert set(re.findall(r"\baoti_torch\w+", body)) <= RUNTIME_FUNCTIONS
    assert len(list(kernel_calls(_source(lowered, code)))) >= 6


@pytest.mark.parametrize("code", CODES)
def test_state_is_passed_to_its_kernel_as_it_came(lowered, code):
    inputs = 4 if code.startswith("prefill") else 3
    users = [
        kernel
        for kernel, arguments in kernel_calls(_source(lowered, code))
        if f"arg{inputs}_1" in arguments
    ]
    assert len(users) == 1 and "conv" in users[0]
    # Inputs taken to be unaligned would be copied, and updates of the state would be lost.
    assert "aoti_torch_clone" not in run_body(_source(lowered, code))


@pytest.mark.parametrize("code", CODES)
def test_shared_object(lowered, code):
    file = lowered / f"{code}.so"
    needed = set(_tool("nm", "-D", "--undefined-only", file).split())
    functions = {FIND_KERNEL, *(f"et_moe_{name}" for name in RUNTIME_FUNCTIONS)}
    assert {n for n in needed if "et_moe" in n or "aoti_torch" in n} <= functions
    assert {"cuLaunchKernel", "cuModuleLoadData", FIND_KERNEL} <= needed
    exported = _tool("nm", "-D", "--defined-only", file).split()[2::3]
    assert exported and all(symbol.startswith("AOTInductor") for symbol in exported)
    libraries = re.findall(r"NEEDED.*\[(.*)\]", _tool("readelf", "-d", file))
    allowed = re.compile(r"(libc|libm|libgcc_s|ld-linux-x86-64)\.so")
    assert not [library for library in libraries if not allowed.match(library)]
    # The code must run on any x86-64 processor: it has neither AVX, whose instructions begin with
    # v, nor BMI.
    newer = r"\t(v(?!err|erw|m)\w+|[sr]\wrx|rorx|mulx|andn|bls\w+|[tl]zcnt|movbe)\s"
    assert not re.search(newer, _tool("objdump", "-d", "--no-show-raw-insn", file))
    content = file.read_bytes()
    for folder in (str(lowered), str(Path(torch.__file__).parent), str(Path.home())):
        assert folder.encode() not in content
    sections = _tool("readelf", "-SW", file)
    assert ".debug_info" not in sections and ".note.gnu.build-id" not in sections


def test_pte_describes_the_methods(description):
    assert description["backend"] == "EtMoeCudaBackend"
    constants = description["constants"]
    assert constants["get_max_seq_len"] == 128 and constants["get_eos_ids"] == "[1, 2]"
    assert json.loads(constants["get_backend"]) == "cuda"
    assert set(description["methods"]) == {"prefill", "decode"}
    plan = plan_weights(methods())
    bindings = json.loads(constants["get_bindings"])
    assert set(bindings) == {"methods", "state", "weights"}
    for name, entry in description["methods"].items():
        for key, value in bindings["methods"][name].items():
            assert entry[key] == value
        assert (entry["state"], entry["weights"]) == (bindings["state"], bindings["weights"])
        tokens = {"name": "tokens", "dtype": "int64", "shape": [1, 1]}
        if name == "prefill":
            tokens |= {"shape": [1, MAX_TOKENS], "min_shape": [1, 2]}
        names = ["tokens", "positions", "slots"]
        names += ["num_tokens"] if name == "prefill" else []
        assert [i["name"] for i in entry["inputs"]] == names
        assert entry["inputs"][0] == tokens
        (state,) = entry["state"]
        assert state == {
            "name": "conv.state",
            "dtype": "bfloat16",
            "shape": [1 << 20, 3, 128],
            "min_shape": [1, 3, 128],
            "pool": "slots",
        }
        assert entry["own_pool"] == OWN_POOL
        assert [w["name"] for w in entry["weights"]] == list(WEIGHTS)
        assert [tuple(w["shape"]) for w in entry["weights"]] == [s for _, s in plan.spec.values()]
        assert entry["outputs"] == [
            {"name": "token", "dtype": "int64", "shape": [1, 1], "index": 0},
            {"name": "logits", "dtype": "float32", "shape": [1, VOCABULARY], "index": 1},
        ]
        hand_over = {"token": "token", "tokens": "tokens", "positions": "positions"}
        assert entry["hand_over"] == (hand_over if name == "decode" else None)
        assert entry["prepack"] == PREPACK_VERSION
        assert entry["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("code", CODES)
def test_pte_holds_the_code(lowered, description, code):
    host, entry = (lowered / f"{code}.so").read_bytes(), _entry(description, code)
    assert entry["data"] == code and entry["longest"] == int(code.split(".")[-1])
    assert entry["bytes"] == len(host)
    assert entry["sha256"] == hashlib.sha256(host).hexdigest()
    assert (lowered / "model.pte").read_bytes().count(host) == 1
    calls = [kernel for kernel, _ in kernel_calls(_source(lowered, code))]
    assert entry["launches"] == len(calls) == sum(k["launches"] for k in entry["kernels"])
    assert {k["name"]: k["launches"] for k in entry["kernels"]} == {
        name: calls.count(name) for name in calls
    }


@pytest.mark.parametrize("code", CODES)
def test_sidecar_says_how_to_execute_every_launch(lowered, description, code):
    name, arch, longest = code.split(".")
    ranges = json.loads((lowered / "sidecar.json").read_text())[name][arch]
    kernels = ranges[LONGEST[name].index(int(longest))]
    digests = {k["name"]: k["sha256"] for k in _entry(description, code)["kernels"]}
    source = _source(lowered, code)
    assert {k["name"] for k in kernels} == {kernel for kernel, _ in kernel_calls(source)}
    for kernel in kernels:
        (function,) = (
            node
            for node in ast.parse(kernel["source"]).body
            if isinstance(node, ast.FunctionDef) and node.name == kernel["function"]
        )
        assert [ast.unparse(d) for d in function.decorator_list] == ["triton.jit"]
        # Triton launches kernels with floats in fp32, and so must the host program.
        assert "fp64" not in [kind for _, kind in kernel["parameters"]]
        names = {p for p, _ in kernel["parameters"]} | set(kernel["constants"])
        assert names == {a.arg for a in function.args.args}
        # The host program passes as many arguments as there are parameters, and two scratch
        # pointers.
        start = source.index(f" call_{kernel['name']}(")
        passed = re.search(r"kernel_args_\[\] = \{(.*)\};", source[start:])[1].split(",")
        assert len(passed) == len(kernel["parameters"]) + 2
        # A driver can tell which kernel it is given by the digest of its binary, by which the host
        # program asks for it.
        assert kernel["sha256"] == digests[kernel["name"]]
        assert source.count(f'{FIND_KERNEL}("{kernel["sha256"]}"), "{kernel["function"]}"') >= 1
        if kernel["module"]:
            assert hasattr(importlib.import_module(kernel["module"]), kernel["function"])
        else:
            assert kernel["name"].startswith("triton_")


def _kernels(description: dict, code: str) -> dict[str, str]:
    """The digests of the kernels that the code `code` launches, by name."""
    return {k["name"]: k["sha256"] for k in _entry(description, code)["kernels"]}


def _binaries(lowered: Path) -> dict[str, bytes]:
    """The binaries of the kernels in the program, by the names under which they are stored."""
    file = deserialize_pte_binary((lowered / "model.pte").read_bytes())
    blobs = file.named_data.pte_data.items()
    content = {name: bytes(file.named_data.buffers[e.buffer_index]) for name, e in blobs}
    return {name: data for name, data in content.items() if name not in CODES}


def test_kernels_are_stored_once(lowered, description):
    """A kernel is stored once even if several ranges and methods launch it, and nothing else is
    stored."""
    binaries, pte = _binaries(lowered), (lowered / "model.pte").read_bytes()
    launched = [_kernels(description, code).values() for code in CODES]
    assert set(binaries) == set().union(*launched)
    assert len(binaries) < sum(map(len, launched))
    for digest, binary in binaries.items():
        assert hashlib.sha256(binary).hexdigest() == digest and pte.count(binary) == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_ranges_have_kernels_of_their_size(lowered, description, arch):
    """Two ranges have the same graph, with configurations for few and for many tokens: of the GEMM
    and of the convolution."""
    few, many, one = (
        _kernels(description, code)
        for code in (f"prefill.{arch}.16", f"prefill.{arch}.{MAX_TOKENS}", f"decode.{arch}.1")
    )
    assert list(few) == list(many)
    own = {"_gemm": [], "_causal_conv1d": []}
    for name in few:
        if few[name] != many[name]:
            own[next(kind for kind in own if kind in name)].append(name)
    assert all(own.values())
    (gemm,) = own["_gemm"]
    sidecar = json.loads((lowered / "sidecar.json").read_text())["prefill"][arch]
    blocks = [k["constants"]["BLOCK_M"] for part in sidecar[1:] for k in part if k["name"] == gemm]
    with tuning_target(gpu_for(arch).name, arch):
        expected = [find_config("linear_w4a8", tokens=n)["BLOCK_M"] for n in (16, MAX_TOKENS)]
    assert blocks == expected and expected[0] < expected[1]
    assert set(few.values()) & set(one.values()), "methods share kernels, too"


def test_second_export_is_quick_and_the_same(lowered):
    report = json.loads((lowered / "report.json").read_text())
    assert report["same"] and report["same_after_damage"]
    assert report["seconds"] < report["first_seconds"] / 5
    assert report["cuda_before_and_after"] == [torch.cuda.is_available(), torch.version.cuda]


def test_same_bytes_in_another_process(lowered, alone):
    """A method compiled alone, without the cache, in another folder, and with other hashes of
    strings is the same."""
    expected = hashlib.sha256((lowered / "decode.sm_80.1.so").read_bytes()).hexdigest()
    assert (alone / "again.txt").read_text() == expected


def test_refused_graphs(alone):
    errors = json.loads((alone / "errors.json").read_text())
    kind, message = errors["LibraryCall"]
    assert kind == "UnsupportedOpError" and "mm" in message
    kind, message = errors["CopiedState"]
    assert kind == "RuntimeError" and "state conv.state is copied by" in message


def test_launches_of_a_decoded_token(alone):
    """The 35B model has these four layers ten times; its embedding, head and sampler come once."""
    report = json.loads((alone / "launches.json").read_text())
    assert report["layers"] == ["linear_attention"] * 3 + ["full_attention"]
    assert 10 * report["launches"] <= 360
    own = [name for name in report["plain"] if not name.startswith("triton_")]
    assert own == ["_embedding_kernel"], "these kernels wait for their predecessor's end to start"


def test_rows_of_drafts_of_any_number_of_sequences(alone):
    """They take the kernels for decoding, and what is accepted is found in one launch."""
    report = json.loads((alone / "drafts.json").read_text())
    assert list(report) == ["4", "16", str(MAX_TOKENS)]
    for launches in report.values():
        own = {name for name in launches if not name.startswith("triton_")}
        assert {"_conv_step_kernel", "_norm_rows_kernel", "_finish_kernel"} <= own
        assert "_causal_conv1d_kernel" not in own
        assert sum("bitwise_and_eq" in name for name in launches) == 1


def test_a_signal_leaves_nothing_of_a_compile(tmp_path_factory):
    """The signal comes while ptxas works; `_run` looks for files that were left."""
    report = json.loads((_run("ended", tmp_path_factory) / "ended.json").read_text())
    assert report == {"error": "ended by SIGTERM", "files_then": True}


def test_damaged_files_are_noticed(lowered, description):
    pte = (lowered / "model.pte").read_bytes()
    code = (lowered / "decode.sm_80.1.so").read_bytes()
    name = next(n for n in _kernels(description, "decode.sm_80.1") if "hand_over" in n)
    kernel = _binaries(lowered)[_kernels(description, "decode.sm_80.1")[name]]
    for content in (code, kernel):
        flipped = bytearray(pte)
        flipped[pte.index(content) + len(content) // 2] ^= 1
        with pytest.raises(ValueError, match=r"decode, sm_80, up to 1: the code is damaged"):
            inspect(bytes(flipped))
    for damaged in (b"", b"not a program", pte[:1000], pte[: len(pte) // 2]):
        with pytest.raises(ValueError, match="not an ExecuTorch program"):
            inspect(damaged)


def test_program_for_another_backend():
    from executorch.exir import to_edge

    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    with pytest.raises(ValueError, match="no method is delegated"):
        inspect(to_edge(program).to_executorch().buffer)


@pytest.mark.parametrize(
    ("archs", "message"),
    [([], "no CUDA architecture given"), (["sm_90", "sm_75"], "'sm_75' is not supported")],
)
def test_architectures_are_checked_first(archs, message):
    with pytest.raises(ValueError, match=message):
        lower({"decode": method(Small(), True)}, archs, {}, None, OWN_POOL)


def test_sizes_that_vary_otherwise_are_refused():
    """A shorter tensor must be the beginning of a longer one, and outputs as long as inputs."""
    for model, message in (
        (Columns(), "method prefill: output logits varies in an inner dimension"),
        (Pairs(), "method prefill: output logits varies with no input"),
    ):
        with pytest.raises(ValueError, match=message):
            lower({"prefill": method(model, False)}, ["sm_90"], {}, None, OWN_POOL)
