"""The machine code of all kernels in all tuned configurations for all architectures.

No GPU is needed.
"""

import collections
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from et_moe.benchmarks.static import checked, machine_code
from et_moe.benchmarks.static import compile as compiler
from et_moe.benchmarks.static.check import faults
from et_moe.benchmarks.static.collect import Demands, Job
from et_moe.benchmarks.static.compare import compare_rows
from et_moe.benchmarks.static.summary import cells, summarize


def test_all_kernels_compile_well():
    # Kernels of this process may be interpreted: those to compile need one of their own.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Those of checked.txt were compiled before; of them only a sample is.
    command = [sys.executable, "-m", "et_moe.benchmarks", "static", "--changed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 faults" in done.stdout


def test_nothing_is_compiled_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "et_moe.benchmarks", "static", "--only", "sample"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


def job(arch="sm_90", **changes):
    fields = {"module": "m", "kernel": "k", "signature": (), "constexprs": (), "divisible": ()}
    return Job(**fields | {"arch": arch, "options": ()} | changes)


@pytest.mark.parametrize(
    "change,fault",
    [
        ({}, None),
        ({"error": "no"}, "no"),
        ({"spilled_bytes": 8}, "8 bytes spilled"),
        ({"shared_memory": 300000}, "shared memory"),
        ({"int8_mma": []}, "tensor-core"),
        ({"tensor_instructions": 0}, "tensor-core"),
        ({"int8_mma": ["mma.sync"]}, "wgmma"),
        ({"load_widths": {"w": [8, 16]}}, "w is loaded"),
        ({"load_widths": {}}, "w is loaded never"),
    ],
)
def test_faults(change, fault):
    demands = Demands(tensor_cores=True, wgmma=True, streams={"w"})
    row = {
        "spilled_bytes": 0,
        "shared_memory": 1000,
        "int8_mma": ["wgmma.mma_async"],
        "tensor_instructions": 4,
        "load_widths": {"w": [16]},
    }
    found = faults(job(), demands, row | change)
    assert len(found) == (fault is not None) and (fault is None or fault in found[0])


def test_a_key_covers_the_job_and_what_is_asked_of_it(monkeypatch):
    kernels = {name: SimpleNamespace(cache_key=name) for name in ("k", "other")}
    monkeypatch.setattr(checked.importlib, "import_module", lambda _: SimpleNamespace(**kernels))
    jobs = [job(), job("sm_80"), job(options=(("num_warps", 8),)), job(kernel="other")]
    plain = checked.keys({j: Demands() for j in jobs})
    demanding = checked.keys({jobs[0]: Demands(tensor_cores=True)})
    assert len({*plain.values(), *demanding.values()}) == 5
    assert checked.keys({jobs[0]: Demands(cases={"other"})}) == {jobs[0]: plain[jobs[0]]}


def test_what_was_checked_is_compiled_in_turns(tmp_path):
    path = tmp_path / "checked.txt"
    assert checked.read_checked(path) == set()
    found = {job(options=(("n", n),)): f"{n:016x}" for n in range(10 * checked.SAMPLE)}
    assert checked.to_compile(found, set()) == list(found)
    _new, *old = found.values()
    checked.write_checked(old, path)
    some = checked.to_compile(found, checked.read_checked(path))
    assert next(iter(found)) in some and len(some) in (10, 11)
    # Another change, another turn.
    others = [
        checked.to_compile(found | {job(options=(("n", -n),)): f"-{n}"}, {*found.values(), f"-{n}"})
        for n in range(20)
    ]
    assert len({tuple(found[j] for j in other if j in found) for other in others}) > 5


def test_families_leave_no_job_out():
    archs = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
    jobs = [job(arch) for arch in archs] + [job("sm_86", options=(("num_warps", 8),))]
    found = compiler.families(jobs)
    assert sorted(map(len, found)) == [1, 1, 1, 3]
    assert {j for family in found for j in family} == set(jobs)
    assert (jobs[0], jobs[1], jobs[2]) in found


@pytest.fixture
def compiled(monkeypatch):
    """Records how the jobs are compiled: the architectures from source, and from LLVM IR."""
    calls = collections.defaultdict(list)

    def from_source(job, target):
        calls["source"].append(job.arch)
        return {"llir": "same" if job.arch != "sm_89" else calls["of sm_89"][0]}, 7

    def from_llvm_ir(llir, job, target):
        calls[llir].append(job.arch)
        return {"llir": llir}

    def describe(job, asm, shared_memory, log):
        return compiler.Compiled({"shared_memory": shared_memory})

    monkeypatch.setattr(compiler, "compile_source", from_source)
    monkeypatch.setattr(compiler, "_from_llvm_ir", from_llvm_ir)
    monkeypatch.setattr(compiler, "_describe", describe)
    return calls


FAMILY = tuple(job(arch) for arch in ("sm_80", "sm_86", "sm_89"))


def test_one_compilation_serves_a_family(compiled):
    results = compiler.compile_family(FAMILY)
    assert compiled == {"source": ["sm_80"], "same": ["sm_86", "sm_89"]}
    assert [result.row for result in results] == [{"shared_memory": 7}] * 3


@pytest.mark.parametrize("llir", ["same", "other"])
def test_a_verified_family_must_share_its_llvm_ir(compiled, llir):
    compiled["of sm_89"].append(llir)
    rows = [result.row for result in compiler.compile_family(FAMILY, verify=True)]
    assert compiled["source"] == ["sm_80", "sm_86", "sm_89"]
    assert rows[:2] == [{"shared_memory": 7}] * 2
    assert ("LLVM IR is not that of sm_80" in rows[2].get("error", "")) == (llir == "other")


def test_machine_code_of_a_cubin():
    """An ELF file with two sections of code and one of another kind."""
    contents = {
        "": b"",
        ".names": b"",
        ".text.a": b"A" * 32,
        ".nv.info": b"?",
        ".text.b": b"B" * 16,
    }
    contents[".names"] = b"".join(name.encode() + b"\0" for name in contents)
    body, headers, names = b"", b"", 0
    for name, data in contents.items():
        headers += struct.pack("<IIQQQQIIQQ", names, 1, 0, 0, 64 + len(body), len(data), 0, 0, 1, 0)
        body += data
        names += len(name) + 1
    elf = bytearray(64)
    struct.pack_into("<Q", elf, 0x28, 64 + len(body))
    struct.pack_into("<HHH", elf, 0x3A, 64, len(contents), 1)
    assert machine_code.machine_code(bytes(elf) + body + headers) == b"A" * 32 + b"B" * 16


NOP = struct.pack("<QQ", 0x0000000000007918, 0x000FC00000000000)
EXIT = struct.pack("<QQ", 0x000000000000794D, 0x000FEA0003800000)


def test_opcodes_are_counted_kernel_by_kernel():
    codes = [EXIT + NOP, NOP * 3, EXIT]
    counts = machine_code.count_opcodes("sm_90", codes)
    assert counts == [{"EXIT": 1, "NOP": 1}, {"NOP": 3}, {"EXIT": 1}]


def test_what_is_no_machine_code_is_not_counted():
    with pytest.raises(RuntimeError, match="nvdisasm for sm_90"):
        machine_code.count_opcodes("sm_90", [b"\xff" * 16])


PTX = """//
.visible .entry first(.param .u64 first_param_0)
{
	.loc	1 94 0                          // prepare.py:94:0
$L__func_begin0:
	ld.param.b64 	%rd1, [first_param_0];
$L__tmp0:
	ret;
}
	.section	.debug_abbrev
"""


def test_the_hash_of_ptx_ignores_names_and_lines():
    other = PTX.replace("first", "second").replace("94", "95").replace("$L__tmp0:\n", "")
    assert machine_code.hash_ptx(PTX, "first") == machine_code.hash_ptx(other, "second")
    changed = PTX.replace("ret;", "bar.sync 0; ret;")
    assert machine_code.hash_ptx(PTX, "first") != machine_code.hash_ptx(changed, "first")


def row(kernel, code, arch="sm_90", configuration="BLOCK=1", ptx=None):
    found = {"arch": arch, "kernel": kernel, "configuration": configuration}
    return found | {"sass": code, "ptx": ptx or code}


def test_rows_are_compared_by_code():
    old = [row("same", "1"), row("renamed", "2"), row("changed", "3"), row("gone", "4")]
    old += [row("twice", "5"), row("twice", "6"), row("unstable", "7", ptx="p")]
    new = [row("same", "1"), row("now", "2"), row("changed", "8"), row("new", "9")]
    new += [row("twice", "6"), row("twice", "5"), row("unstable", "0", ptx="p")]
    assert compare_rows(old, new) == {
        "renamed": ["sm_90 now [BLOCK=1]"],
        "differ": ["sm_90 changed [BLOCK=1]"],
        "gone": ["sm_90 gone [BLOCK=1]"],
        "new": ["sm_90 new [BLOCK=1]"],
    }


def test_code_of_another_architecture_or_an_error_is_not_the_same():
    error = {"arch": "sm_90", "kernel": "k", "configuration": "BLOCK=1", "error": "no"}
    assert compare_rows([row("k", "1", "sm_80")], [row("k", "1")])["new"] == ["sm_90 k [BLOCK=1]"]
    assert compare_rows([error], [error])["differ"] == ["sm_90 k [BLOCK=1]"]


def test_summary_spans_the_configurations():
    def measured(arch, registers, shared, tensor, spilled=0):
        figures = {"registers": registers, "shared_memory": shared, "spilled_bytes": spilled}
        return row("k", "1", arch) | figures | {"tensor_instructions": tensor}

    rows = [measured("sm_80", 40, 1024, 0), measured("sm_80", 60, 5000, 16, 8)]
    rows += [measured("sm_90", 30, 0, 0), row("k", "1", "sm_90") | {"error": "no"}]
    (line,) = summarize(rows)
    assert line["spilled_bytes"] == 8 and line["configurations"] == 3
    assert cells(line) == ["k", "3", "40-60, 1-5, 0-16", "", "", "30, 0, 0", "", ""]
