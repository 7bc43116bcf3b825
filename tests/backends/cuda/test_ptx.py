"""What a kernel reads and writes, and when, as its PTX shows."""

import pytest

from et_moe.backends.cuda import ptx

PTX = """
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b64 	%rd3, [kernel_param_2];
	mad.wide.u32 	%rd4, %r1, 16, %rd1;
	add.s64 	%rd5, %rd4, 4096;
	@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 0 ];
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd4 + 0 ], 0x10, 0x10;
	ld.global.b64 	%rd6, [ %rd2 + 8 ];
	shl.b64 	%rd7, %rd6, 2;
	add.s64 	%rd8, %rd3, %rd7;
	@!%p2 ld.global.L1::evict_last.v2.b16 { %rs1, %rs2 }, [ %rd8 + 0 ];
"""


def test_load_widths():
    """A load's width counts for the pointers that its address comes from, not for values that were
    loaded to compute it."""
    assert ptx.load_widths(PTX, ["a", "b", "c"]) == {"a": {16}, "b": {8}, "c": {4}}


PARAMETERS = ["weight", "x", "out"]
LOAD_WEIGHT = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];"
LOAD_X = "cp.async.cg.shared.global [ %r6 + 0 ], [ %rd5 + 0 ], 0x10, 0x10;"
STORE = "@%p1 st.global.b32 [ %rd6 + 0 ], { %r9 };"
ADD = "red.global.add.f32 [%rd6], %f1;"
WAIT, START = "griddepcontrol.wait; // dummy %r7", "griddepcontrol.launch_dependents; // dummy %r8"


def kernel(*lines: str) -> str:
    """The PTX of a kernel with three pointers, whose body contains these lines."""
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


@pytest.mark.parametrize(
    "access",
    [
        "ld.b32 %r9, [%rd6];",
        "st.b32 [%rd6], %r9;",
        "ld.global.nc.b32 %r9, [global_table];",
        "{ .reg .pred p; @p st.global.b32 [$1], %r9; }",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [%rd6, {%r2, %r3}], [%r4];",
    ],
)
def test_what_is_not_understood_is_refused(access):
    with pytest.raises(ValueError, match="unknown access to memory"):
        ptx.read_early(kernel(access, WAIT, STORE), PARAMETERS)
    with pytest.raises(ValueError, match="unknown access to memory"):
        ptx.written(kernel(WAIT, access), PARAMETERS)


@pytest.mark.parametrize(
    "address",
    [
        "ld.shared.b64 %rd9, [%r5];",
        "ld.shared.v2.b64 {%rd8, %rd9}, [%r5+16384];",
        "mov.b64 %rd9, {%r5, %r6};",
    ],
)
@pytest.mark.parametrize("step", ["mov.b64 %rd10, %rd9;", "add.s64 %rd10, %rd9, %rd4;"])
def test_an_address_of_unknown_origin_may_be_any(address, step):
    read, store = "ld.global.b32 %r9, [ %rd10 + 0 ];", "st.global.b32 [ %rd10 + 0 ], { %r9 };"
    assert ptx.read_early(kernel(address, step, read, WAIT), PARAMETERS) == set(PARAMETERS)
    assert ptx.written(kernel(WAIT, address, step, store), PARAMETERS) == set(PARAMETERS)
    assert ptx.load_widths(kernel(address, step, read), PARAMETERS) == {}


def test_an_address_from_nowhere_may_be_any():
    store = kernel("mov.b64 %rd9, table;", "st.global.b32 [ %rd9 + 0 ], { %r9 };")
    assert ptx.written(store, PARAMETERS) == set(PARAMETERS)


def test_an_address_that_a_loop_moves_on():
    """What the loop adds to the address after the load counts as well."""
    lines = ("add.s64 %rd9, %rd4, 8;", "ld.global.b32 %r9, [ %rd9 + 0 ];", WAIT)
    moved = kernel(*lines, "add.s64 %rd9, %rd9, %rd5;", STORE)
    assert ptx.read_early(moved, PARAMETERS) == {"weight", "x"}


@pytest.mark.parametrize(
    "line",
    [
        "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];",
        "@%p1 st.shared.b32 [%r5], %r1;",
        "atom.shared.add.u32 %r1, [%r5], 1;",
        "ld.param.b32 %r1, [kernel_param_3];",
        "cp.async.commit_group;",
        "cp.async.wait_group 0x1;",
        "tcgen05.st.sync.aligned.16x32bx2.x64.b32 [%r1], 64, {%r2, %r3};",
        "tcgen05.wait::st.sync.aligned;",
        "{ .reg .pred p; @p cp.async.bulk.prefetch.L2.global [%rd6], 256; mov.b32 %r1, 0; }",
    ],
)
def test_what_reads_no_global_memory_is_passed_over(line):
    assert ptx.read_early(kernel(line, WAIT, STORE), PARAMETERS) == set()
    assert ptx.written(kernel(line, STORE), PARAMETERS) == {"out"}
