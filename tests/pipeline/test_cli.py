"""The command line: what each command writes, and what it says of bad input."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import change_config
from files import file_size_limit, files_of

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import export
from et_moe.pipeline.make_bundle import make_bundle
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import DEFAULT_RECIPE

Run = Callable[..., tuple[int, str, str]]


def test_inspect_of_a_folder_says_which_file(run: Run, tmp_path: Path) -> None:
    code, _, error = run("inspect", tmp_path)
    assert code == 1 and f"{tmp_path}: a folder, expected a .pte, and the folder has no" in error
    (tmp_path / "model.pte").write_text("This is no program.")
    code, _, error = run("inspect", tmp_path)
    assert code == 1 and f"expected a .pte, such as {tmp_path}/model.pte" in error
    code, _, error = run("inspect", tmp_path / "model.pte")
    assert code == 1
    assert error.startswith(f"error: {tmp_path}/model.pte: not an ExecuTorch program (.pte), exp")


def test_a_refused_export_shows_no_progress(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bundle = ("export", "--prequantized", tiny_bundle)
    for options, fault in (
        (("--max-seq-len", 0, "--output-dir", tmp_path / "x"), "--max-seq-len 0: expected 3 to"),
        (("--output-dir", "/proc/x9"), "/proc/x9: cannot make this folder: No such file or"),
        (("--output-dir", tmp_path / "file"), f"{tmp_path / 'file'}: not a folder"),
    ):
        for part in ((), ("--graph-only",), ("--weights-only",)):
            code, _, error = run(*bundle, *options, *part)
            assert code == 1 and error.startswith(f"error: {fault}"), error


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_checkpoint` to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_make_checkpoint(run: Run, tmp_path: Path) -> None:
    arguments = ("--preset", "tiny", "--seed", 5, "--layers", 2)
    assert run("make-checkpoint", "--output", tmp_path / "a", *arguments)[0] == 0
    make_checkpoint(tmp_path / "b", MODEL, "tiny", 5, 2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert run("make-checkpoint", "--output", tmp_path / "c", "--quantized", *arguments)[0] == 0
    make_bundle(tmp_path / "d", MODEL, "tiny", 5, 2, DEFAULT_RECIPE)
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")


def test_quantize(run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    source = ("quantize", "--model-dir", tiny_checkpoint, "--qlinear-group-size", 32)
    source += ("--recipe", "4w")
    code, _, err = run(*source, "--output-dir", tmp_path / "b")
    assert code == 0 and "quantizing" in err and f"wrote the bundle {tmp_path / 'b'}" in err
    assert files_of(tmp_path / "b") == files_of(tiny_bundle)
    assert run(*source, "--output-dir", tmp_path / "m", "--scale-method", "minmax")[0] == 0
    assert files_of(tmp_path / "m") != files_of(tiny_bundle)


def test_export(run: Run, tiny_checkpoint, tiny_bundle, tiny_program, tmp_path: Path) -> None:
    """A checkpoint and its bundle give the same files, at once or in two parts."""
    expected = files_of(tiny_program)
    bundle = ("export", "--prequantized", tiny_bundle, "--max-seq-len", 32)
    checkpoint = ("export", "--model-dir", tiny_checkpoint, "--max-seq-len", 32)
    assert run(*bundle, "--output-dir", tmp_path / "a")[0] == 0
    assert files_of(tmp_path / "a") == expected
    options = ("--qlinear", "4w", "--qlinear-group-size", 32, "--qembedding", "8w")
    options += ("--moe-activation-dtype", "int8", "--dtype", "float32", "--backend", "cpu")
    assert run(*checkpoint, *options, "--output-dir", tmp_path / "b")[0] == 0
    assert files_of(tmp_path / "b") == expected
    assert run(*bundle, "--output-dir", tmp_path / "c", "--graph-only")[0] == 0
    assert files_of(tmp_path / "c") == {"model.pte": expected.pop("model.pte")}
    assert run(*bundle, "--output-dir", tmp_path / "d", "--weights-only")[0] == 0
    assert files_of(tmp_path / "d") == expected


def test_help_and_unknown_words(run: Run, refused) -> None:
    for command in ("quantize", "export", "eval", "make-checkpoint"):
        code, out, _ = run(command, "--help")
        assert code == 0 and "--" in out
        refused(command, "--no-such-option", parts=["--no-such-option"], code=2)
        refused(command, parts=["Missing option"], code=2)
    said = refused("export", "--output-dir", "x", "--recipe", "foo", parts=[], code=2)
    assert said == "error: --recipe: 'foo' is not one of '4w', 'mixed', 'dense'."
    assert run()[0] == 0
    refused("no-such-command", parts=["no-such-command"], code=2)
    refused("make-checkpoint", "--output", "x", "--preset", "big", parts=["'big'"], code=2)
    refused("make-checkpoint", "--output", "x", "--seed", "x", parts=["--seed"], code=2)


@pytest.mark.parametrize("command", ["quantize", "export"])
class TestDamagedCheckpoints:
    """Both commands that read a checkpoint refuse each case and write nothing."""

    @pytest.fixture(autouse=True)
    def _refused(self, refused, command: str, tmp_path: Path) -> None:
        def check(directory: Path, *options: object, parts: list[object]) -> None:
            output = tmp_path / "output"
            common = (command, "--model-dir", directory, "--output-dir", output)
            refused(*common, *(options or ("--qlinear-group-size", 32)), parts=parts)
            assert not output.exists() or not list(output.iterdir())

        self.refused = check

    def test_missing(self, checkpoint: Path, tmp_path: Path) -> None:
        self.refused(tmp_path / "no", parts=["error: ", tmp_path / "no", "no such"])
        weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
        content = weights.read_bytes()
        weights.unlink()
        self.refused(checkpoint, parts=[checkpoint, "safetensors"])
        weights.write_bytes(content)
        values = json.loads(config.read_text())
        del values["model_type"]
        config.write_text(json.dumps(values))
        self.refused(checkpoint, parts=[config, "model_type"])
        config.unlink()
        self.refused(checkpoint, parts=[config])

    def test_missing_and_unexpected_tensors(self, checkpoint: Path) -> None:
        """A name in the file's header changes, but not the header's size."""
        path = checkpoint / "model.safetensors"
        name = b"model.layers.1.self_attn.q_proj.weight"
        assert path.read_bytes().count(name) == 1
        path.write_bytes(path.read_bytes().replace(name, name.replace(b"q_proj", b"q_porj")))
        missing = f"missing tensors: {name.decode().removeprefix('model.')}"
        unexpected = f"unexpected tensors: {name.decode().replace('q_proj', 'q_porj')}"
        parts = [checkpoint, missing, unexpected]
        self.refused(checkpoint, parts=parts)

    def test_damaged_safetensors(self, checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        whole = path.read_bytes()
        for data in (b"", whole[:7], whole[:100], whole[: len(whole) // 2], whole[:-1]):
            path.write_bytes(data)
            self.refused(checkpoint, parts=[f"error: {path}: "])
        for position in (1, 7, 8, 9, 40):
            changed = bytearray(whole)
            changed[position] ^= 0x40
            path.write_bytes(changed)
            self.refused(checkpoint, parts=["error: ", checkpoint])

    def test_damaged_config(self, checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[0] ^= 0x10
        for data in (b"", whole[:1], whole[: len(whole) // 2], whole[:-3], bytes(flipped), b"\xff"):
            path.write_bytes(data)
            self.refused(checkpoint, parts=[f"error: {path}: "])

    @pytest.mark.parametrize(
        "values",
        [
            {"model_type": "llama"},
            {"hidden_act": "gelu"},
            {"hidden_size": 0},
            {"num_experts_per_tok": 4},
            {"layer_types": ["linear_attention", "sliding_attention"]},
            {"num_key_value_heads": 3},
        ],
        ids=str,
    )
    def test_unsupported_config_values(self, checkpoint: Path, values: dict) -> None:
        change_config(checkpoint, **values)
        self.refused(checkpoint, parts=[f"error: {checkpoint / 'config.json'}: ", *values])

    def test_group_sizes(self, checkpoint: Path) -> None:
        for size, message in ((64, "does not divide"), (48, "expected one of"), (0, "expected")):
            self.refused(
                checkpoint, "--qlinear-group-size", size, parts=[f"group size {size}", message]
            )


def test_bundles_that_do_not_work(refused, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, output = shutil.copytree(tiny_bundle, tmp_path / "b"), tmp_path / "output"

    def check(*parts: object) -> None:
        common = ("export", "--prequantized", bundle, "--output-dir", output)
        refused(*common, "--max-seq-len", 32, parts=["error: ", *parts])
        assert not output.exists() or not list(output.iterdir())

    shard = bundle / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    check(f"error: {shard}: ")
    changed = bytearray(whole)
    changed[8] ^= 1
    shard.write_bytes(changed)
    check(shard)
    shard.unlink()
    check(f"error: {shard}: ")
    shard.write_bytes(whole)
    change_config(bundle, et_moe={"bundle_version": 3, "storages": {"head": "3w"}})
    check(bundle / "config.json", "storages")
    (bundle / "config.json").unlink()
    check(bundle / "config.json")


WRONG_OPTIONS = [
    ([], "exactly one of --model-dir, --model-id and --prequantized"),
    (["--model-dir", "x", "--prequantized", "x"], "exactly one of --model-dir, --model-id and"),
    (["--model-dir", "x", "--model-id", "a/b"], "exactly one of --model-dir, --model-id and"),
    (["--prequantized", "x", "--qlinear", "4w"], "--qlinear is fixed by the bundle"),
    (["--prequantized", "x", "--qlinear-group-size", "32"], "--qlinear-group-size is fixed by the"),
    (["--prequantized", "x", "--qembedding", "none"], "--qembedding is fixed by the bundle"),
    (["--model-dir", "x", "--cuda-arch", "sm_90"], "--cuda-arch needs --backend cuda"),
    (["--model-dir", "x", "--debug-sidecar"], "--debug-sidecar needs --backend cuda"),
    (["--model-dir", "x", "--preset", "tiny"], "--preset takes --graph-only and no checkpoint"),
    (["--preset", "tiny"], "--preset takes --graph-only and no checkpoint"),
    (["--model-dir", "x", "--graph-only", "--weights-only"], "exclude each other"),
    (["--model-dir", "x", "--backend", "metal"], "'metal'"),
    (["--model-dir", "x", "--dtype", "float16"], "'float16'"),
    (["--model-dir", "x", "--qlinear", "3w"], "'3w'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS, ids=[m for _, m in WRONG_OPTIONS])
def test_wrong_options(refused, tmp_path: Path, options: list[str], message: str) -> None:
    refused("export", "--output-dir", tmp_path / "output", *options, parts=[message], code=2)
    assert not list(tmp_path.iterdir())


def test_values_out_of_range(refused, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    common = ("export", "--prequantized", tiny_bundle, "--output-dir", output)
    for length in (-1, 0, 1, 2, 65):
        message = f"--max-seq-len {length}: expected 3 to 64"
        refused(*common, "--max-seq-len", length, parts=[message])
    refused(*common, "--backend", "cuda", "--cuda-arch", "sm_1", parts=["sm_1", "sm_90"])
    refused("make-checkpoint", "--output", output, "--layers", 0, parts=["layers", "0"])
    assert not output.exists() or not list(output.iterdir())


def test_outputs_that_cannot_be_written(refused, tiny_checkpoint, tiny_bundle, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    commands = [
        ("quantize", "--model-dir", tiny_checkpoint, "--qlinear-group-size", 32, "--output-dir"),
        ("export", "--prequantized", tiny_bundle, "--output-dir"),
        ("make-checkpoint", "--output"),
        ("make-checkpoint", "--quantized", "--output"),
    ]
    for command in commands:
        for path in (file, file / "x", Path("/proc/x")):
            named = file if file in path.parents else path
            refused(*command, path, parts=["error: ", named])
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and file.read_text() == "kept"


@pytest.mark.parametrize("flag", [None, "--graph-only", "--weights-only"])
def test_an_export_tries_its_files_before_the_work(
    refused, tiny_bundle: Path, tmp_path: Path, monkeypatch, flag: str | None
) -> None:
    def work(*_) -> None:
        raise AssertionError

    monkeypatch.setattr(export, "lower", work)
    monkeypatch.setattr(export, "plan_weights", work)
    file = tmp_path / "out" / ("model.ptd" if flag == "--weights-only" else "model.pte")
    file.mkdir(parents=True)
    flags = [flag] if flag else []
    command = ("export", "--prequantized", tiny_bundle, "--max-seq-len", 32, *flags, "--output-dir")
    refused(*command, tmp_path / "out", parts=["error: ", file])
    assert list(file.parent.iterdir()) == [file] and not list(file.iterdir())
    with pytest.raises(AssertionError):
        refused(*command, tmp_path / "new" / "folder", parts=[])
    assert not (tmp_path / "new").exists()


def test_quantize_tries_its_folder_before_the_work(refused, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(QuantizedCheckpoint, "groups", lambda self: pytest.fail("it works"))
    common = ("quantize", "--model-dir", tiny_checkpoint, "--qlinear-group-size", 32)
    refused(*common, "--output-dir", "/proc", parts=["error: ", "/proc/config.json"])


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        ("quantize --model-dir {checkpoint} --qlinear-group-size 32 --output-dir", 5000),
        ("export --prequantized {bundle} --max-seq-len 32 --weights-only --output-dir", 5000),
        # ExecuTorch writes its schemas to temporary files, which are smaller.
        ("export --prequantized {bundle} --max-seq-len 32 --output-dir", 40_000),
        ("make-checkpoint --output", 5000),
        ("make-checkpoint --quantized --output", 5000),
    ],
)
def test_full_disk(
    refused, tiny_checkpoint, tiny_bundle, tmp_path: Path, command: str, limit: int
) -> None:
    """Nothing is left that a later command would take for whole."""
    output = tmp_path / "output"
    words = command.format(checkpoint=tiny_checkpoint, bundle=tiny_bundle).split()
    with file_size_limit(limit):
        refused(*words, output, parts=["error: ", output, "File too large"])
    names = {p.name for p in output.iterdir()} if output.exists() else set()
    assert not names & {"config.json", "model.pte", "model.ptd"}, names
    assert not [name for name in names if "tmp" in name], names


def test_an_existing_checkpoint_is_left_alone(refused, tiny_checkpoint, checkpoint: Path) -> None:
    before = files_of(checkpoint)
    common = ("quantize", "--model-dir", tiny_checkpoint, "--qlinear-group-size", 32)
    refused(*common, "--output-dir", checkpoint, parts=[checkpoint, "already holds a config"])
    refused("make-checkpoint", "--output", checkpoint, parts=[checkpoint])
    assert files_of(checkpoint) == before


def test_as_a_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The installed command ends with one line on stderr, exit code 1 and no traceback."""
    command = Path(sys.executable).with_name("et-moe")
    arguments = ["quantize", "--model-dir", tmp_path / "no", "--output-dir", tmp_path / "b"]
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "no") in done.stderr
    arguments = ["--model-dir", tiny_checkpoint, "--output-dir", "/dev/full/x"]
    arguments += ["--qlinear-group-size", "32"]
    module = [sys.executable, "-m", "et_moe.pipeline.cli", "quantize"]
    done = subprocess.run([*module, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "/dev/full" in done.stderr
