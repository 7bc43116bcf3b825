"""Which kernels of a host program may start before their predecessor ends, told from their PTX."""

import pytest

from et_moe.backends.cuda import ptx
from et_moe.backends.cuda.host_program import Accesses, find_dependents, launch_dependents

PARAMETERS = ["weight", "x", "out"]
LOAD_WEIGHT = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];"
LOAD_X = "cp.async.cg.shared.global [ %r6 + 0 ], [ %rd5 + 0 ], 0x10, 0x10;"
STORE = "@%p1 st.global.b32 [ %rd6 + 0 ], { %r9 };"
ADD = "red.global.add.f32 [%rd6], %f1;"
WAIT, START = "griddepcontrol.wait; // dummy %r7", "griddepcontrol.launch_dependents; // dummy %r8"


def kernel(*lines: str) -> str:
    """PTX of a kernel with three pointers, which goes through these lines."""
    head = [f"\tld.param.b64 \t%rd{i + 1}, [kernel_param_{i}];" for i in range(3)]
    head += [f"\tmad.wide.u32 \t%rd{i + 4}, %r5, 4, %rd{i + 1};" for i in range(3)]
    return "\n".join([*head, *(f"\t{line}" for line in lines), "\tret;"])


def test_accesses():
    text = kernel(LOAD_WEIGHT, WAIT, START, LOAD_X, STORE)
    assert ptx.read_early(text, PARAMETERS) == {"weight"}
    assert ptx.written(text, PARAMETERS) == {"out"}
    assert ptx.load_widths(text, PARAMETERS) == {"weight": {16}, "x": {16}}
    assert not ptx.starts_next_early(text)
    assert ptx.starts_next_early(kernel(START, WAIT, STORE))
    assert ptx.written(kernel(ADD), PARAMETERS) == {"out"}


def test_a_kernel_that_does_not_wait():
    assert ptx.read_early(kernel(LOAD_X, STORE), PARAMETERS) is None


@pytest.mark.parametrize("store", [STORE, ADD])
def test_writing_before_waiting_is_refused(store):
    with pytest.raises(ValueError, match=r"\['out'\] are written before"):
        ptx.read_early(kernel(store, WAIT), PARAMETERS)


def program(*calls: str) -> str:
    """A host program of calls like "gemv(buf0, arg1_1)"."""
    body = "".join(f"    call_{call};\n" for call in calls)
    return f"void AOTInductorModel::run_impl(\n{body}}} // AOTInductorModel::run_impl"


ARGUMENTS = ["x", "out"]
PLAIN = Accesses(ARGUMENTS, None, {"out"})
WAITS = Accesses(ARGUMENTS, set(), {"out"})
EARLY_X = Accesses(ARGUMENTS, {"x"}, {"out"})
BRIEF = Accesses(ARGUMENTS, set(), {"out"}, starts_next_early=True)


@pytest.mark.parametrize(
    ("calls", "kernels", "dependents"),
    [
        (["a(buf0, buf1)", "b(buf1, buf2)"], {"a": PLAIN, "b": WAITS}, {"b"}),
        # The kernel that comes before a call is not known.
        (["a(buf0, buf1)", "b(buf1, buf2)"], {"a": WAITS, "b": WAITS}, {"b"}),
        # b reads early what its predecessor writes, or what the one before wrote.
        (["a(arg0_1, buf1)", "b(buf1, buf2)"], {"a": PLAIN, "b": EARLY_X}, set()),
        (
            ["a(arg0_1, buf1)", "c(buf0, buf3)", "b(buf1, buf2)"],
            {"a": PLAIN, "b": EARLY_X, "c": WAITS},
            {"b", "c"},
        ),
        # c lets b start while a may still run; c itself is safe.
        (
            ["a(arg0_1, buf1)", "c(buf0, buf3)", "b(buf1, buf2)"],
            {"a": PLAIN, "b": EARLY_X, "c": BRIEF},
            {"c"},
        ),
        # One unsafe call is enough, whatever the tensor looks like there.
        (
            ["a(arg0_1, buf1)", "b(buf0, buf2)", "b(reinterpret(buf2, 1, 2L), buf3)"],
            {"a": PLAIN, "b": EARLY_X},
            set(),
        ),
    ],
)
def test_find_dependents(calls, kernels, dependents):
    assert find_dependents(program(*calls), kernels) == dependents


def test_a_tensor_that_is_not_known_is_refused():
    with pytest.raises(RuntimeError, match="argument tmp_1 of a kernel names no tensor"):
        find_dependents(program("a(arg0_1, buf1)", "b(tmp_1, buf2)"), {"a": PLAIN, "b": EARLY_X})


def test_launch_dependents():
    source = (
        "static inline void launchKernel(\nlaunchKernel(kernels_.a, 1);launchKernel(kernels_.b,"
    )
    changed = launch_dependents(source, {"b"})
    assert "cuLaunchKernelEx" in changed
    assert changed.endswith("launchKernel(kernels_.a, 1);launchDependentKernel(kernels_.b,")
    assert launch_dependents(source, set()) == source
    with pytest.raises(RuntimeError, match="another host program"):
        launch_dependents(source, {"c"})
