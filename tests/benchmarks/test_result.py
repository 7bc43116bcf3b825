"""Where a result says that it comes from, and how it is written."""

import json
import subprocess

import pytest

from et_moe.benchmarks import result


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a commit of two files, in the place of this project's."""
    folder = tmp_path / "repository"
    (folder / "code").mkdir(parents=True)
    (folder / "code/a.py").write_text("a = 1\n")
    (folder / "ü.txt").write_text("")
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "x")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    monkeypatch.setattr(result, "REPO", folder)
    monkeypatch.delenv(result.MANIFEST_VARIABLE, raising=False)
    return folder


def head(folder):
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_of_a_checkout(repository):
    assert result.commit() == {"commit": head(repository), "modified": False}
    (repository / "code/a.py").write_text("a = 2\n")
    assert result.commit() == {"commit": head(repository), "modified": True}


def test_no_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "REPO", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(result.MANIFEST_VARIABLE, raising=False)
    assert result.commit() == {"commit": None, "modified": None}
    assert result.committed_files() == {}


def test_commit_of_a_copy_without_history(repository, tmp_path, monkeypatch):
    files = result.committed_files()
    assert set(files) == {"code/a.py", "ü.txt"}
    manifest = {"commit": "c" * 40, "modified": False, "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv(result.MANIFEST_VARIABLE, str(tmp_path / "manifest.json"))
    assert result.commit() == {"commit": "c" * 40, "modified": False}
    (repository / "code/a.py").write_text("a = 2\n")
    assert result.commit() == {"commit": head(repository), "modified": True}
    (repository / "code/a.py").unlink()
    assert result.commit()["commit"] == head(repository)


def test_a_manifest_without_files_says_nothing(repository, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"commit": "c" * 40, "modified": False}))
    monkeypatch.setenv(result.MANIFEST_VARIABLE, str(tmp_path / "manifest.json"))
    assert result.commit()["commit"] == head(repository)


def test_the_gpu_is_described(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.04, 143771 MiB, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert result.describe_gpu() == {
        "gpu": "NVIDIA H200",
        "driver": "580.159.04",
        "memory": "143771 MiB",
        "compute_capability": "9.0",
    }
    found = result.provenance("x")
    assert (found["machine"], found["driver"]) == ("NVIDIA H200", "580.159.04")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert result.describe_gpu() is None
    assert result.provenance("x")["machine"] and result.provenance("x")["driver"] is None


def test_a_packed_folder_is_called_folder(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setenv(result.MANIFEST_VARIABLE, str(tmp_path / "manifest.json"))
    assert result.provenance(f"x --out {tmp_path}/y.json")["command"] == "x --out FOLDER/y.json"


def test_versions_are_told():
    found = result.versions()
    assert found["torch"] and found["python"].startswith("3.")


def test_rounding_keeps_significant_digits():
    value = {"a": [123456.789, 0.000123456789, 0.0, float("inf")], "b": "x", "c": 7, "d": None}
    assert result.rounded(value, 4) == {
        "a": [123500.0, 0.0001235, 0.0, float("inf")],
        "b": "x",
        "c": 7,
        "d": None,
    }


def test_a_result_has_a_line_a_row(tmp_path):
    value = {"command": "x", "empty": [], "rows": [{"a": 1, "b": [1, 2]}, {"a": 2}], "n": None}
    path = tmp_path / "new/result.json"
    result.write_result(path, value)
    text = path.read_text()
    assert json.loads(text) == value
    assert '  {"a": 1, "b": [1, 2]},\n  {"a": 2}\n' in text and len(text.splitlines()) == 9
