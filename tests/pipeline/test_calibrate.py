"""Importance of columns: how it is measured, and what quantizing makes of it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import GPTQ, make_small, per_expert, storages, to_gptq, write
from files import files_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM

from et_moe.backends import ops
from et_moe.benchmarks.reference.simulated import Simulation
from et_moe.examples.qwen3_5_moe.tokenizer import IM_END, tokenizer_json
from et_moe.pipeline.calibrate import Calibration, read_windows
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.importance import KIND, Importance, Moments, important, write_importance
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Dense

TEXT = "Columns that meet large inputs matter more than those that meet small ones.\n" * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict, dict[str, Tensor]]:
    """A checkpoint with its config and its tensors."""
    folder = tmp_path / "small"
    config, tensors = make_small(folder)
    return folder, config, {name.removeprefix("model."): t for name, t in tensors.items()}


def measured(folder: Path, text: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return Calibration(checkpoint, read_windows(text, checkpoint)).run()


def random_importance(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).square().bfloat16().float()
        for name, shape in shapes.items()
    }


def importance_file(path: Path, folder: Path, **changes: Tensor | None) -> dict[str, Tensor]:
    """Writes a file of random importance for a checkpoint; entries may be replaced or left out."""
    given = random_importance(important(Checkpoint(folder))) | changes
    write_importance(path, {name: tensor for name, tensor in given.items() if tensor is not None})
    return given


def test_moments_are_those_of_the_inputs_in_hugging_faces_model(small, text):
    folder = small[0]
    found = measured(folder, text)
    checkpoint = Checkpoint(folder)
    windows = read_windows(text, checkpoint)
    assert windows.shape == (len(TEXT) // 64, 64)
    model = Qwen3_5MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = Simulation(model).moments(windows)
    names = {name for name in found if not name.endswith(".rows")}
    assert names == set(expected)
    for name, moments in expected.items():
        assert torch.equal(found[f"{name}.rows"], moments.rows), name
        if "shared_expert.down" not in name:  # which meets its inputs times the shared gate
            torch.testing.assert_close(found[name], moments.mean(), rtol=1e-3, atol=1e-9)
    assert found["layers.0.mlp.experts.gate_up_proj.rows"].sum() == 2 * windows.numel()


def test_every_layout_of_experts_gives_the_same(small, text, tmp_path):
    folder, config, tensors = small
    split = write(tmp_path / "split", config, per_expert(tensors))
    (split / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    fused, apart = measured(folder, text), measured(split, text)
    for index in range(config["num_experts"]):
        for projection, table in (("gate", "gate_up"), ("up", "gate_up"), ("down", "down")):
            name = f"layers.1.mlp.experts.{index}.{projection}_proj.weight"
            whole = f"layers.1.mlp.experts.{table}_proj"
            assert torch.equal(apart[name], fused[whole][index])
            assert apart[f"{name}.rows"] == fused[f"{whole}.rows"][index]


def test_two_runs_give_the_same_bytes(small, text, tmp_path):
    for name in ("a", "b"):
        write_importance(tmp_path / name, measured(small[0], text))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_experts_that_are_never_chosen_have_the_mean_of_all():
    moments = Moments.zeros(3, 4, device=torch.device("cpu"))
    moments.add(torch.full((1000, 4), 2.0), 0)
    moments.add(torch.full((10, 4), 4.0), 1)
    mean = moments.mean()
    common = (1000 * 4.0 + 10 * 16.0) / 1010
    torch.testing.assert_close(mean[2], torch.full((4,), common))
    assert mean[0, 0] == pytest.approx(4.0, rel=0.02) and common < mean[1, 0] < 16


def quantized(folder: Path, chosen, path: Path, method="search") -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    source = QuantizedCheckpoint(checkpoint, chosen, method, Importance(path, checkpoint))
    return {name: t for group in source.groups() for name, t in group.items()}


@pytest.mark.parametrize("layout", ["fused", "per expert"])
def test_each_weight_is_quantized_with_its_own_importance(small, tmp_path, layout):
    folder, config, tensors = small
    if layout == "per expert":
        folder = write(tmp_path / "split", config, per_expert(tensors))
    path = tmp_path / "importance"
    given = importance_file(path, folder)
    found = quantized(folder, storages("4w", 32), path)
    layer = "layers.1.mlp.experts"
    for expert in range(config["num_experts"]):
        if layout == "fused":
            columns = given[f"{layer}.gate_up_proj"][expert]
            inner = given[f"{layer}.down_proj"][expert]
            gate = up = columns
        else:
            gate, up, inner = (
                given[f"{layer}.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down")
            )
        weight = tensors[f"{layer}.gate_up_proj"][expert]
        for rows, columns in ((slice(0, 32), gate), (slice(32, 64), up)):
            packed, scale = ops.quantize_w4(weight[rows], 32, "search", importance=columns)
            assert torch.equal(found[f"{layer}.w13"][expert, rows], packed)
            assert torch.equal(found[f"{layer}.w13_scale"][expert, rows], scale)
        weight = tensors[f"{layer}.down_proj"][expert]
        packed, scale = ops.quantize_w4(weight, 32, "search", importance=inner)
        assert torch.equal(found[f"{layer}.w2"][expert], packed)
        assert torch.equal(found[f"{layer}.w2_scale"][expert], scale)
    q, k, v = (f"layers.1.self_attn.{p}_proj.weight" for p in "qkv")
    packed = torch.cat(
        [ops.quantize_w4(tensors[n], 32, "search", importance=given[n])[0] for n in (q, k, v)]
    )
    assert torch.equal(found["layers.1.self_attn.qkv_proj.weight"], packed)


def test_the_shared_experts_importance_goes_where_its_weight_goes(small, tmp_path):
    """In the tables it takes two slots: the first columns of its `down` meet those of the first."""
    folder, config, tensors = small
    path, shared = tmp_path / "importance", "layers.0.mlp.shared_expert.down_proj.weight"
    columns = torch.rand(40).bfloat16().float()
    importance_file(path, folder, **{shared: columns})
    joined = quantized(folder, storages("4w", 32), path)["layers.0.mlp.experts.w2"]
    first = ops.quantize_w4(tensors[shared][:, :32], 32, "search", importance=columns[:32])[0]
    assert torch.equal(joined[config["num_experts"]], first)
    apart = {**storages("4w", 32), "shared_expert": storages("none")["shared_expert"]}
    found = quantized(folder, apart, path)
    assert torch.equal(found["layers.0.mlp.shared_expert.down_proj.weight"], tensors[shared])


def test_importance_takes_no_part_in_what_is_not_int4(small, tmp_path):
    folder, path = small[0], tmp_path / "importance"
    importance_file(path, folder)
    plain = QuantizedCheckpoint(Checkpoint(folder), storages("4w", 32)).groups()
    expected = {name: t for group in plain for name, t in group.items()}
    found = quantized(folder, storages("4w", 32), path, "mse")
    assert list(found) == list(expected)
    different = {name for name in found if not torch.equal(found[name], expected[name])}
    parts = ("proj.", "experts.w", "lm_head.")
    assert different == {name for name in found if any(part in name for part in parts)}


def test_an_embedding_has_not_the_importance_of_the_head_that_is_tied_to_it(small, tmp_path):
    """The head's counts what its columns meet; an embedding's columns meet nothing."""
    _, config, tensors = small
    del tensors["lm_head.weight"]
    tied = write(tmp_path / "tied", config | {"tie_word_embeddings": True}, tensors)
    columns = importance_file(tmp_path / "importance", tied)["embed_tokens.weight"]
    chosen = {**storages("4w", 32, "4w"), "experts": Dense(), "shared_expert": Dense()}
    found = quantized(tied, chosen, tmp_path / "importance")
    table = tensors["embed_tokens.weight"]
    for name, importance in (("embed_tokens", None), ("lm_head", columns)):
        packed, scale = ops.quantize_w4(table, 32, "search", importance=importance)
        assert torch.equal(found[f"{name}.weight"], packed), name
        assert torch.equal(found[f"{name}.scale"], scale), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.weight": None}, "lm_head.weight is missing: made of another checkpoint than"),
        ({"layers.7.x": torch.ones(2)}, "layers.7.x is not a weight of the checkpoint: made of"),
        ({"lm_head.weight": torch.ones(31)}, r"lm_head.weight is \('F32', \(31,\)\), expected"),
        ({"lm_head.weight": torch.ones(32).half()}, r"is \('F16', \(32,\)\), expected \('F32'"),
    ],
)
def test_importance_of_another_checkpoint_is_refused(small, tmp_path, changes, message):
    path = tmp_path / "importance"
    importance_file(path, small[0], **changes)
    with pytest.raises(ConfigError, match=f"{path}: .*{message}"):
        Importance(path, Checkpoint(small[0]))


def test_importance_that_is_negative_is_refused(small, tmp_path):
    path = tmp_path / "importance"
    importance_file(path, small[0], **{"lm_head.weight": -torch.ones(32)})
    message = f"{path}: lm_head.weight has entries that are negative or not finite"
    with pytest.raises(ConfigError, match=message):  # before anything is quantized
        Importance(path, Checkpoint(small[0]))


def test_other_files_are_refused(small, tmp_path):
    path = tmp_path / "importance"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match=f"{path}: not a file of `et-moe calibrate`: its header"):
        Importance(path, Checkpoint(small[0]))
    path.write_text("text")
    with pytest.raises(ConfigError, match=f"{path}: not a valid safetensors file"):
        Importance(path, Checkpoint(small[0]))


def test_a_checkpoint_that_keeps_its_scales_is_refused(small, text, tmp_path):
    folder, config, tensors = small
    stored, _ = to_gptq(tensors, ("gate_proj.weight", "up_proj.weight"))
    kept = write(tmp_path / "gptq", config | {"quantization_config": GPTQ}, stored)
    (kept / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="experts arrives quantized and keeps its scales"):
        measured(kept, text)


def test_texts_that_cannot_be_used_are_refused(small, tmp_path):
    folder, text = small[0], tmp_path / "short.txt"
    text.write_text("a")
    with pytest.raises(ConfigError, match=f"{text}: holds fewer than two tokens"):
        measured(folder, text)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"{text}: not UTF-8"):
        measured(folder, text)
    tokenizer = folder / "tokenizer.json"
    merges = [("e", letter) for letter in "abcdefghij"]
    tokenizer.write_text(json.dumps(tokenizer_json(merges)))
    text.write_text(f"text{IM_END}")
    with pytest.raises(ConfigError, match=f"{tokenizer}: gives token 268, the model has 264"):
        measured(folder, text)
    tokenizer.unlink()
    with pytest.raises(ConfigError, match=f"{tokenizer}: cannot be read as a tokenizer"):
        measured(folder, text)


def test_command_line(run, small, text, tmp_path):
    folder, out = small[0], tmp_path / "importance.safetensors"
    code, _, err = run("calibrate", "--model-dir", folder, "--text", text, "--output", out)
    assert code == 0 and f"wrote {out}, of {len(TEXT) // 64 * 64} tokens" in err
    assert load_file(out)["lm_head.weight"].shape == (32,)
    flags = ("--model-dir", folder, "--qlinear-group-size", 32)
    for name, more in (
        ("plain", ()),
        ("default", ("--importance", out)),
        ("search", ("--importance", out, "--scale-method", "search")),
        ("mse", ("--importance", out, "--scale-method", "mse")),
    ):
        assert run("quantize", *flags, "--output-dir", tmp_path / name, *more)[0] == 0
    plain, default, search, mse = (
        files_of(tmp_path / name) for name in ("plain", "default", "search", "mse")
    )
    assert default == search
    assert plain != mse != search != plain
    code, _, err = run("quantize", *flags, "--output-dir", tmp_path / "no", "--importance", text)
    assert code == 1 and f"{text}: not a valid safetensors file" in err
    more = ("--importance", out, "--scale-method", "minmax")
    code, _, err = run("quantize", *flags, "--output-dir", tmp_path / "no", *more)
    assert code == 2 and "--scale-method minmax takes no --importance" in err
    assert not (tmp_path / "no").exists()


def test_kind_has_one_entry():
    """The library writes several in an order of its own, and files would differ."""
    assert len(KIND) == 1
