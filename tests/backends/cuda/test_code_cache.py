"""The cache of compiled code: what its key covers, whom it trusts, and that it never costs one."""

import ast
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import pwd
import resource
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import triton
from lowering_methods import Small, method, methods

from et_moe.backends.cuda import code_cache, compile
from et_moe.backends.cuda.code_cache import CodeCache, cache_key, compile_cached, open_cache
from et_moe.backends.cuda.compile import CompiledMethod, CompiledRange
from et_moe.backends.cuda.gpu import gpu_for
from et_moe.backends.cuda.inductor import Kernel
from et_moe.backends.cuda.prepack import plan_weights

REPO = Path(__file__).resolve().parents[3]
KERNEL = Kernel("k", "f", "m", "src", [["x", "*bf16"]], {"N": 1}, 4, 0, "0", [["1"]], 2, False)
RANGES = [
    CompiledRange(longest, bytes(range(256)) * longest, "int main() {}\n", [KERNEL])
    for longest in (16, 64)
]
METHOD = CompiledMethod("sm_90", RANGES, {"0": bytes(range(256)) * 40})


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    opened = open_cache(tmp_path / "cache")
    assert opened is not None
    return opened


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Puts a stand-in in the compiler's place and gives the architectures that it was asked for."""
    asked: list[str] = []

    def compile_method(graph, plan, arch: str) -> CompiledMethod:
        asked.append(arch)
        return dataclasses.replace(METHOD, arch=arch)

    monkeypatch.setattr(code_cache, "compile_method", compile_method)
    monkeypatch.setattr(code_cache, "toolchain", lambda: "tools")
    return asked


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    caplog.clear()
    return messages


def _module_file(name: str) -> Path | None:
    path = REPO.joinpath(*name.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((f for f in files if name.startswith("et_moe") and f.is_file()), None)


def _imports(file: Path) -> set[Path]:
    """The files of this project that a file imports, also inside functions, and the files of their
    packages."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parents = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    return {f for f in map(_module_file, names | parents) if f}


def test_the_key_covers_all_that_the_compiler_imports() -> None:
    todo, seen = {_module_file(compile.__name__)}, set()
    while todo:
        seen.add(file := todo.pop())
        todo |= _imports(file) - seen
    assert len(seen) > 40, "the walk has lost its way"
    code = {file for file in seen if file.read_bytes()}  # some packages are empty
    covered = set(code_cache.source_files())
    uncovered = sorted(str(file.relative_to(REPO)) for file in code - covered)
    assert not uncovered, "these decide code, but the key of the cache does not know them"
    assert REPO / "backends/cuda/triton/tuning/linear_w4a8.json" in covered


def test_the_digest_changes_with_each_source(tmp_path: Path) -> None:
    backends = tmp_path / "backends"
    shutil.copytree(REPO / "backends", backends, ignore=shutil.ignore_patterns("__pycache__"))
    digest = code_cache.sources_digest(backends)
    assert digest == code_cache.sources_digest()

    def changed(name: str) -> bool:
        path = backends / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes((before or b"") + b"\n")
        now = code_cache.sources_digest(backends)
        path.unlink() if before is None else path.write_bytes(before)
        return now != digest

    for name in (
        "ops/quantization.py",  # ACTIVATION_TILE
        "ops/moe.py",
        "method_graph.py",
        "cuda/fusion.py",
        "cuda/triton/moe/prefill.py",
        "cuda/triton/tuning/moe_w4a8_down.json",
        "cuda/triton/moe/another.py",
    ):
        assert changed(name), name
    cases = ("cuda/triton/moe/cases.py", "cuda/triton/cases/table.py")
    for name in ("cuda/runtime/backend.cpp", "cpu/lowering.py", *cases):
        assert not changed(name), name
    assert code_cache.sources_digest(backends) == digest


def test_the_key_changes_with_graph_target_tools_and_settings(monkeypatch) -> None:
    graphs = methods()
    plan, gpu = plan_weights(graphs), gpu_for("sm_90")
    key = cache_key(graphs["decode"], plan, gpu, "tools")
    assert key == cache_key(method(Small(), True), plan, gpu, "tools")
    others = [
        cache_key(graphs["prefill"], plan, gpu, "tools"),
        cache_key(graphs["decode"], plan, gpu_for("sm_80"), "tools"),
        cache_key(graphs["decode"], plan, gpu, "other tools"),
    ]
    with code_cache.inductor_config.patch({"triton.unique_kernel_names": False}):
        others.append(cache_key(graphs["decode"], plan, gpu, "tools"))
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "0.0")
        others.append(cache_key(graphs["decode"], plan, gpu, "tools"))
    with monkeypatch.context() as patch:
        patch.setenv("DISABLE_LLVM_OPT", "1")
        others.append(cache_key(graphs["decode"], plan, gpu, "tools"))
    assert len({key, *others}) == 7


def test_an_entry_comes_back_whole_or_not_at_all(cache: CodeCache, tmp_path: Path) -> None:
    assert cache.load("key") is None
    cache.store("key", METHOD)
    assert cache.load("key") == METHOD
    path = tmp_path / "cache" / "key"
    whole = path.read_bytes()
    for i in [*range(0, len(whole), 97), len(whole) - 1]:  # code, source and kernels alike
        changed = bytearray(whole)
        changed[i] ^= 1
        path.write_bytes(changed)
        assert cache.load("key") is None, i
        path.write_bytes(whole[:i])
        assert cache.load("key") is None, i


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"arch": "sm_90", "ranges": [{"code": "eA==", "kernels": [[]]}], "binaries": {}}',
        b'{"arch": "sm_90", "code": "eA==", "source": "", "kernels": []}',
        b'{"arch": "sm_90", "ranges": [], "binaries": [1]}',
        b"\xff",
    ],
    ids=["empty", "null", "no entry", "nested", "no kernel", "one range", "no binaries", "no text"],
)
def test_content_of_another_kind_is_a_miss(cache: CodeCache, tmp_path: Path, content) -> None:
    digest = hashlib.sha256(content).hexdigest().encode()
    (tmp_path / "cache" / "key").write_bytes(digest + b"\n" + content)
    assert cache.load("key") is None


def test_only_its_user_may_read_or_write_it(tmp_path: Path) -> None:
    """This holds for every umask: if a group might write to it, the next export would refuse it."""
    before = os.umask(0o002)
    try:
        cache = open_cache(tmp_path / "new" / "cache")
        cache.store("key", METHOD)
    finally:
        os.umask(before)
    folder = tmp_path / "new" / "cache"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert open_cache(folder).load("key") == METHOD


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o702])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, caplog, mode: int) -> None:
    tmp_path.chmod(mode)
    try:
        assert open_cache(tmp_path) is None
    finally:
        tmp_path.chmod(0o700)
    (message,) = warnings_of(caplog)
    assert str(tmp_path) in message and f"permissions are {mode:04o}" in message
    assert open_cache(tmp_path) is not None and not warnings_of(caplog)


def test_an_entry_that_others_may_write_is_replaced(cache, tmp_path: Path, caplog) -> None:
    cache.store("key", METHOD)
    (tmp_path / "cache" / "key").chmod(0o620)
    assert cache.load("key") is None
    assert "others may write to it" in warnings_of(caplog)[0]
    cache.store("key", METHOD)
    assert cache.load("key") == METHOD and not warnings_of(caplog)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_what_another_user_owns_is_not_used(cache: CodeCache, tmp_path: Path, caplog) -> None:
    cache.store("key", METHOD)
    os.chown(tmp_path / "cache" / "key", 12345, 12345)
    assert cache.load("key") is None
    assert "it belongs to another user (12345)" in warnings_of(caplog)[0]
    cache.store("key", METHOD)
    assert cache.load("key") == METHOD
    os.chown(tmp_path / "cache", 12345, 12345)
    assert open_cache(tmp_path / "cache") is None
    assert "it belongs to another user (12345)" in warnings_of(caplog)[0]


def test_code_is_compiled_once(cache: CodeCache, compiled: list[str]) -> None:
    graph, plan = method(Small(), True), plan_weights({"decode": method(Small(), True)})
    for arch in ("sm_90", "sm_80", "sm_90", "sm_80"):
        assert compile_cached(graph, plan, arch, cache).arch == arch
    assert compiled == ["sm_90", "sm_80"]
    compile_cached(graph, plan, "sm_90", None)
    assert compiled == ["sm_90", "sm_80", "sm_90"]


def _full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


@pytest.mark.parametrize("fault", ["full", "gone"])
def test_code_that_cannot_be_kept_is_not_lost(
    cache: CodeCache, compiled, tmp_path: Path, caplog, fault: str
) -> None:
    graph, plan = method(Small(), True), plan_weights({"decode": method(Small(), True)})
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    _full_disk() if fault == "full" else (tmp_path / "cache").rmdir()
    try:
        results = [compile_cached(graph, plan, arch, cache) for arch in ("sm_90", "sm_80")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [r.arch for r in results] == compiled == ["sm_90", "sm_80"]
    (message,) = warnings_of(caplog)  # the warning comes only once
    assert "compiled code is not kept" in message and str(tmp_path / "cache") in message
    assert fault == "gone" or not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_read_only_warns(tmp_path: Path, caplog) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "x", Path("/proc/et-moe")):
        assert open_cache(folder) is None
        (message,) = warnings_of(caplog)
        assert f"the folder of compiled code {folder} is not used: " in message


def test_without_a_home(monkeypatch, caplog, tmp_path: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert open_cache(Path("~/cache")) is None
    assert "home directory" in warnings_of(caplog)[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_cache(Path("~/cache")) is not None and (tmp_path / "cache").is_dir()


def _store_and_load(folder: Path, until: float, report) -> None:
    """Stores one entry again and again, as processes do that share a cache."""
    problems: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            problems.append(record.getMessage())

    logging.getLogger(code_cache.__name__).addHandler(Handler())
    count = 0
    while time.monotonic() < until:
        cache = open_cache(folder)
        cache.store("key", METHOD)
        if cache.load("key") != METHOD:
            problems.append("an entry that is not whole")
        count += 1
    report.put((count, problems))


def test_processes_that_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    report, until = context.Queue(), time.monotonic() + 3
    arguments = (tmp_path / "cache", until, report)
    processes = [context.Process(target=_store_and_load, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    results = [report.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert min(count for count, _ in results) > 5
    assert [problems for _, problems in results] == [[]] * 4
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["key"]
    assert json.loads((tmp_path / "cache" / "key").read_bytes().split(b"\n")[1])["arch"] == "sm_90"
