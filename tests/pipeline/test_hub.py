"""`--model-id`: a checkpoint is downloaded from a hub, here one on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_small, write
from safetensors.torch import load_file, save_file
from small_hub import Hub, serve

NAME, TOKEN = "some-org/Some-Model", "hf_secret"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkpoint of two shards, with files beside it that are not read."""
    config, tensors = make_small(tmp_path / "small")
    names = list(tensors)
    parts = [{n: tensors[n] for n in names[i::2]} for i in range(2)]
    # huggingface_hub keeps what it has received of a file in pieces of 10 MB.
    parts[0]["mtp.not_read"] = torch.zeros(6 << 20)
    folder = write(tmp_path / "repository", config, *parts)
    (folder / "tokenizer.json").write_bytes((tmp_path / "small/tokenizer.json").read_bytes())
    for name in ("README.md", "pytorch_model.bin", "vocab.json"):
        (folder / name).write_text("not read")
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    return folder


def quantize(hub: Hub, home: Path, output: Path, name: str = NAME, token: str = TOKEN):
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "et_moe.pipeline.cli", "quantize", "--model-id", name]
    command += ["--output-dir", str(output), "--qlinear-group-size", "32"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_only_what_is_read_is_downloaded_once_and_resumed(tmp_path: Path, repository: Path) -> None:
    shards = sorted(path.name for path in repository.glob("model-*.safetensors"))
    with serve(repository, NAME, TOKEN, cut={shards[0]}) as hub:
        done = quantize(hub, tmp_path / "home", tmp_path / "bundle")
        assert done.returncode == 0, done.stderr
        names = {name for name, _ in hub.sent}
        small = {"config.json", "model.safetensors.index.json", "tokenizer.json"}
        assert names == {*small, *shards}
        assert any(name == shards[0] and first > 0 for name, first in hub.sent), hub.sent
        hub.sent.clear()
        done = quantize(hub, tmp_path / "home", tmp_path / "again")
        assert done.returncode == 0 and hub.sent == []
    command = ["quantize", "--model-dir", str(repository), "--output-dir", str(tmp_path / "local")]
    command = [sys.executable, "-m", "et_moe.pipeline.cli", *command, "--qlinear-group-size", "32"]
    subprocess.run(command, check=True, capture_output=True)
    for file in (tmp_path / "local").glob("*.safetensors"):
        one, other = load_file(file), load_file(tmp_path / "bundle" / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "token"), [("some-org/Other", TOKEN), (NAME, "hf_wrong"), ("a/b/c", TOKEN)]
)
def test_refusals_are_one_line(tmp_path: Path, repository: Path, name: str, token: str) -> None:
    with serve(repository, NAME, TOKEN) as hub:
        done = quantize(hub, tmp_path / "home", tmp_path / "bundle", name, token)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert line.startswith(f"error: --model-id {name}: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_no_hub(tmp_path: Path) -> None:
    hub = Hub(tmp_path, NAME, TOKEN, url="http://127.0.0.1:9")
    done = quantize(hub, tmp_path / "home", tmp_path / "bundle")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: --model-id {NAME}: " in done.stderr
