"""Outputs that appear whole: what they replace, what they leave, and what they must not touch."""

import errno
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from et_moe.backends import atomic_file as module
from et_moe.backends.atomic_file import atomic_file, atomic_folder, check_writable, write_file
from et_moe.backends.sealed_file import LAYOUT, PtdWriter
from et_moe.pipeline.safetensors_stream import SafetensorsWriter


@pytest.fixture
def umask():
    """Sets the process's umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"first")
    with atomic_file(path) as file:
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second" and names(tmp_path) == ["file"]


def test_nothing_is_left_of_a_block_that_raises(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (None, b"kept"):
        if content:
            path.write_bytes(content)
        with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
            file.write(b"part")
            raise KeyboardInterrupt
        assert names(tmp_path) == (["file"] if content else [])
    assert path.read_bytes() == b"kept"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path, kind in (
        (tmp_path / "missing" / "file", FileNotFoundError),
        (tmp_path / "folder", IsADirectoryError),
        (tmp_path / "loop", OSError),
    ):
        with pytest.raises(kind) as raised:
            write_file(path, b"x")
        assert raised.value.filename == str(path) and "tmp'" not in str(raised.value)
    assert names(tmp_path) == ["folder", "loop"]


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="another"), atomic_file(tmp_path / "file"):
        (tmp_path / "another").read_bytes()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777])
def test_permissions_of_what_is_replaced_stay(tmp_path: Path, umask, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write_file(path, b"x")
    assert permissions(path) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_obeys_the_umask(tmp_path: Path, umask, mask: int) -> None:
    umask(mask)
    write_file(tmp_path / "file", b"x")
    assert permissions(tmp_path / "file") == 0o666 & ~mask
    write_file(tmp_path / "private", b"x", mode=0o600)
    assert permissions(tmp_path / "private") == 0o600
    (tmp_path / "private").chmod(0o666)
    write_file(tmp_path / "private", b"x", mode=0o600)
    assert permissions(tmp_path / "private") == 0o600


def test_content_is_never_open_to_more_than_the_file_was(tmp_path: Path, umask) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o600)
    with atomic_file(path):
        (temporary,) = (p for p in tmp_path.iterdir() if p != path)
        assert permissions(temporary) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_of_what_is_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.chown(path, 12345, 23456)
    path.chmod(0o640)
    write_file(path, b"x")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)
    assert permissions(path) == 0o640


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "a" / "target", tmp_path / "b" / "link"
    target.parent.mkdir()
    link.parent.mkdir()
    link.symlink_to(Path("..") / "a" / "target")
    for content in (b"made", b"replaced"):  # a link to what does not exist yet, then to a file
        write_file(link, content)
        assert link.is_symlink() and target.read_bytes() == content
        assert names(target.parent) == ["target"] and names(link.parent) == ["link"]


def read_fifo(path: Path) -> tuple[threading.Thread, list[bytes]]:
    """Reads all of a FIFO in a thread, into the list that is returned."""
    content: list[bytes] = []
    thread = threading.Thread(target=lambda: content.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, content


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    (tmp_path / "link").symlink_to(path)
    for name in ("fifo", "link"):
        thread, content = read_fifo(path)
        write_file(tmp_path / name, b"x" * 100_000)
        thread.join(10)
        assert content == [b"x" * 100_000]
        assert stat.S_ISFIFO(path.stat().st_mode) and names(tmp_path) == ["fifo", "link"]


def test_weights_are_written_to_a_fifo(tmp_path: Path) -> None:
    """The writers of large files go forward only, so that a pipe can take them elsewhere."""
    spec = {"a": (torch.uint8, (100,)), "b": (torch.bfloat16, (3, 50))}
    writers = {
        "ptd": lambda path: PtdWriter(path, spec, {LAYOUT: "rows"}),
        "safetensors": lambda path: SafetensorsWriter(path, spec, {"format": "pt"}),
    }
    os.mkfifo(tmp_path / "fifo")
    for name, make in writers.items():
        thread, content = read_fifo(tmp_path / "fifo")
        for path in (tmp_path / name, tmp_path / "fifo"):
            with make(path) as writer:
                for key, (dtype, shape) in spec.items():
                    writer.write(key, torch.ones(shape, dtype=dtype))
        thread.join(10)
        assert content == [(tmp_path / name).read_bytes()]


def test_a_reader_that_went_away_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.open("rb").close(), daemon=True)
    thread.start()
    with pytest.raises(BrokenPipeError) as raised, atomic_file(path) as file:
        thread.join(10)
        file.write(b"x" * 1_000_000)
    assert raised.value.filename == str(path)


@pytest.mark.parametrize("name", ["file", "link"])
@pytest.mark.parametrize("stream", [1, 2])
def test_what_standard_output_goes_to_is_written_through_it(
    tmp_path: Path, name: str, stream: int
) -> None:
    """Replacing that file would lose what is printed before and after.

    `link` is a link of our own to where `/dev/stdout` leads. With that one, a fault in a test run
    as root would replace it for the whole machine.
    """
    path = tmp_path / "file"
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{stream}")
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
            os.write(stream, b"before ")
            write_file(tmp_path / name, b"within ")
            os.write(stream, b"after")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"before within after"
    assert (tmp_path / "link").is_symlink()


def test_whether_a_file_can_be_written_is_found_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    os.mkfifo(tmp_path / "fifo")  # nobody reads it, so that opening it would wait forever
    for name in ("a", "new", "fifo"):
        check_writable(tmp_path / name)
    check_writable(Path("/dev/null"))
    for path in (tmp_path / "missing" / "a", tmp_path / "a" / "b", tmp_path, Path("/proc/a")):
        with pytest.raises(OSError) as raised:
            check_writable(path)
        assert raised.value.filename == str(path)
    assert names(tmp_path) == ["a", "fifo"] and (tmp_path / "a").read_text() == "kept"


def test_a_socket_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        for attempt in (check_writable, lambda path: write_file(path, b"x")):
            with pytest.raises(OSError, match="is a socket") as raised:
                attempt(path)
            assert raised.value.filename == str(path)


def test_a_descriptor_that_is_only_read_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"kept")
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        check_writable(Path(f"/dev/fd/{file.fileno()}"))
    assert path.read_bytes() == b"kept"


def in_a_process(body: Callable[[], None]) -> str:
    """The error that `body` ends with in a process of its own, or "done"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "done"
        try:
            body()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as file:
        return file.read().decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_what_is_anothers_in_a_sticky_folder_is_refused_before_the_work() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's, whose parents are root's alone
        folder = Path(name)
        (folder / "file").write_bytes(b"kept")
        (folder / "folder").mkdir()
        for path in (folder, folder / "file", folder / "folder"):
            path.chmod(0o1777 if path.is_dir() else 0o666)

        def make_folder(path: Path) -> None:
            with atomic_folder(path):
                raise AssertionError("too late")

        def as_another(attempt: Callable[[Path], None], path: Path) -> str:
            def run() -> None:
                os.setgroups([])
                os.setgid(12345)
                os.setuid(12345)
                attempt(path)

            return in_a_process(run)

        for attempt, path in ((check_writable, "file"), (make_folder, "folder")):
            said = as_another(attempt, folder / path)
            assert "it may not be replaced" in said and str(folder / path) in said
        assert as_another(check_writable, folder / "new") == "done"
        assert names(folder) == ["file", "folder"]
        assert (folder / "file").read_bytes() == b"kept"


MOUNTED = """
import sys
from pathlib import Path
from et_moe.backends.atomic_file import atomic_folder, check_writable, write_file

file, folder = map(Path, sys.argv[1:])
check_writable(file)
assert file.read_bytes() == b"kept"
write_file(file, b"new")
try:
    with atomic_folder(folder):
        print("too late")
except OSError as error:
    print(error)
"""


def test_what_is_a_mount_point(tmp_path: Path) -> None:
    """A file is written to, and a folder refused before the work: neither can be replaced."""
    for name in ("source", "mounted"):
        (tmp_path / name).write_bytes(b"kept")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    script = 'mount --bind source mounted && mount --bind a b && exec "$@" mounted b'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", MOUNTED], cwd=tmp_path, capture_output=True, text=True
    )
    if re.match("(unshare|mount): ", done.stderr):
        pytest.skip(done.stderr)
    message = f"[Errno {errno.EBUSY}] is a mount point: name a folder in it: 'b'\n"
    assert (done.stderr, done.stdout) == ("", message)
    assert (tmp_path / "source").read_bytes() == b"new"
    assert (tmp_path / "mounted").read_bytes() == b"kept"
    assert names(tmp_path) == ["a", "b", "mounted", "source"]


def test_temporary_names_cannot_be_planted(tmp_path: Path, monkeypatch) -> None:
    """Neither a link nor a file at the temporary name is opened, and the name is not guessable."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"kept")
    seen = set()
    for _ in range(3):
        with atomic_file(tmp_path / "file"):
            seen |= set(names(tmp_path)) - {"victim", "file"}
    assert len(seen) == 3 and not [name for name in seen if str(os.getpid()) in name]
    for plant in (lambda path: path.symlink_to(victim), lambda path: path.hardlink_to(victim)):
        planted = tmp_path / "planted.tmp"
        plant(planted)
        monkeypatch.setattr(module, "temporary_path", lambda target, planted=planted: planted)
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "file", b"x")
        planted.unlink(missing_ok=True)
    assert victim.read_bytes() == b"kept"


def test_a_folder_appears_whole(tmp_path: Path, umask) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path) as made:
        (made / "file").touch()
        assert not path.exists()
    assert names(tmp_path) == ["folder"] and names(path) == ["file"]
    assert permissions(path) == 0o755
    (path / "file").unlink()
    path.chmod(0o700)
    (tmp_path / "link").symlink_to("folder")
    with atomic_folder(tmp_path / "link") as made:  # over an empty one
        (made / "other").touch()
    assert names(tmp_path) == ["folder", "link"] and names(path) == ["other"]
    assert permissions(path) == 0o700


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "file").touch()
    with pytest.raises(OSError, match="not empty") as raised, atomic_folder(path) as made:
        (made / "other").touch()
    assert raised.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as raised, atomic_folder(path) as made:
        (made / "missing" / "file").touch()
    assert raised.value.filename == str(path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder"] and names(path) == ["file"]
