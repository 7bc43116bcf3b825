"""What scripts/setup.sh says and does about system packages, with stand-ins for apt and others."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path: Path):
    """Runs setup.sh on a machine without libpcre2-dev and with a Python that it refuses."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {
        "dpkg": "case $2 in libpcre2-dev | chromium-headless-shell) exit 1 ;; esac",
        "apt-get": f'echo "$@" >>{tmp_path / "apt.log"}',
        "python3": 'case $2 in "import ensurepip"* | "import os, sysconfig"*) ;; *) exit 1 ;; esac',
        "g++": "true",
        "id": "echo 0",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPO / "scripts/setup.sh", tmp_path / "scripts")

    def run(*flags: str, **environment: str) -> tuple[int, str, str, list[str]]:
        done = subprocess.run(
            [tmp_path / "scripts/setup.sh", *flags],
            env={"PATH": f"{tools}:{os.defpath}"} | environment,
            capture_output=True,
            text=True,
        )
        log = tmp_path / "apt.log"
        installed = log.read_text().splitlines() if log.exists() else []
        return done.returncode, done.stdout, done.stderr, installed

    return run


def test_what_apt_installs_is_said_before(setup) -> None:
    code, output, error, installed = setup()
    assert output == "setup: apt-get installs libpcre2-dev (ET_MOE_APT=no refuses)\n"
    assert installed == ["update -qq", "install -y -qq libpcre2-dev"]
    assert code == 1 and "expected 3.11, 3.12 or 3.13" in error


def test_apt_can_be_refused(setup) -> None:
    code, output, error, installed = setup(ET_MOE_APT="no")
    assert (code, output, installed) == (1, "", [])
    assert "ET_MOE_APT=no" in error and "apt-get install libpcre2-dev" in error


def test_a_browser_is_for_tests(setup) -> None:
    """Only Debian has the package."""
    is_debian = "\nID=debian" in "\n" + Path("/etc/os-release").read_text()
    *_, installed = setup("--for-tests")
    browser = " chromium-headless-shell" if is_debian else ""
    assert installed[-1] == f"install -y -qq libpcre2-dev{browser}"


def test_the_lock_has_a_hash_of_everything() -> None:
    for name in ("lock.txt", "torch-cuda.txt", "torch-cpu.txt"):
        text = (REPO / "requirements" / name).read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
        assert lines
        for line in lines:
            assert "==" in line.split()[0] and "--hash=sha256:" in line, line


def test_the_lock_is_of_this_pyproject() -> None:
    """Every requirement of pyproject.toml but Ray's is met by what is locked; else run
    scripts/lock.sh."""
    with (REPO / "pyproject.toml").open("rb") as file:
        content = tomllib.load(file)
    project = content["project"]
    wanted = [*project["dependencies"], *content["build-system"]["requires"]]
    extras = project["optional-dependencies"]
    wanted += [line for name, lines in extras.items() if name != "ray" for line in lines]
    locked: dict[str, set[str]] = {}
    files = [REPO / "requirements" / name for name in ("lock.txt", "torch-cuda.txt")]
    for line in "\n".join(file.read_text() for file in files).splitlines():
        if "==" in line.split(" ")[0]:
            name, version = line.split(" ")[0].split("==")
            locked.setdefault(name, set()).add(version)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == "et-moe":
            continue
        assert locked.get(name), f"{name} is not locked"
        assert all(requirement.specifier.contains(v) for v in locked[name]), requirement
