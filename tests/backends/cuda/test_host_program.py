"""Which kernels of a host program may start before their predecessor ends."""

import pytest

from et_moe.backends.cuda.host_program import (
    FIND_KERNEL,
    Accesses,
    find_dependents,
    find_kernels,
    launch_dependents,
    split_interface,
)


def program(*calls: str) -> str:
    """A host program that makes these calls, which look like "gemv(buf0, arg1_1)"."""
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
        # b reads early what its predecessor writes, or what the kernel before that one wrote.
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
        # One unsafe call is enough, in whatever form the tensor is passed there.
        (
            ["a(arg0_1, buf1)", "b(buf0, buf2)", "b(reinterpret(buf2, 1, 2L), buf3)"],
            {"a": PLAIN, "b": EARLY_X},
            set(),
        ),
        (
            ["a(arg0_1, buf1)", "b(buf0, buf2)", "b(Handle(tmp_buf2_1), buf3)"],
            {"a": PLAIN, "b": EARLY_X},
            set(),
        ),
        (
            ["a(arg0_1, buf1)", "b(buf0, buf2)", "b(Handle(tmp_buf4_2), buf3)"],
            {"a": PLAIN, "b": EARLY_X},
            {"b"},
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


def test_find_kernels():
    source = (
        "static inline void launchKernel(\n"
        'a = loadKernel(__a_start, "f", 0);\nb = loadKernel(__b_start, "f", 8);'
    )
    changed = find_kernels(source, {"a": "00ff", "b": "11ee"})
    assert changed.startswith(f'extern "C" const void* {FIND_KERNEL}(const char* sha256);')
    assert f'a = loadKernel({FIND_KERNEL}("00ff"), "f", 0);' in changed
    assert f'b = loadKernel({FIND_KERNEL}("11ee"), "f", 8);' in changed
    with pytest.raises(RuntimeError, match="another host program"):
        find_kernels(source, {"c": "22dd"})


def test_split_interface():
    interface = "#include <a>\nAOTIRuntimeError AOTInductorModelContainerRun() {}\n"
    own = "#define CUDA_DRIVER_CHECK(EXPR) check(EXPR)\n"
    assert split_interface(interface + own) == (interface, own)
    for other in (interface, own, own + interface):
        with pytest.raises(RuntimeError, match="another host program than expected"):
            split_interface(other)
