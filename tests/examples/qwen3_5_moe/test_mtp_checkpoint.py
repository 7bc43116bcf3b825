"""The MTP head on its way from a checkpoint into a bundle, past programs, and damaged heads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FP8,
    GPTQ,
    assert_equal,
    make_small,
    parameters,
    per_expert,
    spec_of,
    storages,
    to_fp8,
    to_gptq,
    write,
)
from files import files_of
from safetensors.torch import load_file
from typer.testing import CliRunner

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.examples.qwen3_next.model import MODEL as QWEN3_NEXT
from et_moe.pipeline.bundle import Bundle, write_bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.cli import app
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import QuantizedCheckpoint, count_groups, parameter_groups
from et_moe.pipeline.storage import choose_storages

LAYER = "mtp.layers.0"
EXPERTS = tuple(f"{p}_proj.weight" for p in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """Directory, config and tensors of a small checkpoint with a head."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    return directory, *make_small(directory, mtp_num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(small):
    """The groups of its parameters; `test_parameters` compares the head's with the tensors."""
    return parameters(Checkpoint(small[0]).groups(storages()))


def head_of(tensors: dict) -> dict:
    return {name: t for name, t in tensors.items() if name.startswith("mtp.")}


def trunk_of(tensors: dict) -> dict:
    return {name: t for name, t in tensors.items() if not name.startswith("mtp.")}


def quantized(directory: Path) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(Checkpoint(directory), storages("4w", 32, "8w"))


def test_names_are_those_of_published_checkpoints(small) -> None:
    _, _, tensors = small
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    shared = tuple(f"shared_expert.{p}_proj" for p in ("gate", "up", "down"))
    assert head_of(tensors).keys() == {
        "mtp.fc.weight",
        *(f"mtp.{norm}.weight" for norm in norms),
        *(f"{LAYER}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"{LAYER}.self_attn.{name}.weight" for name in attention),
        *(f"{LAYER}.mlp.{name}.weight" for name in ("gate", "shared_expert_gate", *shared)),
        f"{LAYER}.mlp.experts.gate_up_proj",
        f"{LAYER}.mlp.experts.down_proj",
    }
    assert len(head_of(tensors)) == 19
    apart = MODEL.checkpoint_shapes(Checkpoint(small[0]).config, ["mtp.layers.0.mlp.experts.0"])
    assert len(head_of(apart)) == 17 + 3 * 3  # 785 with 256 experts


def test_parameters(small, expected) -> None:
    """The head is the last group; the model's groups are those of a checkpoint without one."""
    directory, _, tensors = small
    *trunk, head = expected
    assert head.keys() == head_of(head).keys()
    fc = [head[f"mtp.fc_{half}.weight"] for half in ("embedding", "hidden")]
    assert torch.equal(torch.cat(fc, 1), tensors["mtp.fc.weight"]) and fc[0].shape == (32, 32)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        assert torch.equal(head[f"mtp.{norm}.weight"], tensors[f"mtp.{norm}.weight"])
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(head[f"{LAYER}.{norm}.weight"], tensors[f"{LAYER}.{norm}.weight"])
    qkv = torch.cat([tensors[f"{LAYER}.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(head[f"{LAYER}.self_attn.qkv_proj.weight"], qkv)
    w13 = head[f"{LAYER}.mlp.experts.w13"]
    assert torch.equal(w13[:3], tensors[f"{LAYER}.mlp.experts.gate_up_proj"])
    assert torch.equal(head[f"{LAYER}.self_attn.inv_freq"], trunk[2]["layers.1.self_attn.inv_freq"])
    without = make_small(directory.with_name("without"))
    assert trunk_of(tensors).keys() == without[1].keys()
    assert_equal(trunk, parameters(Checkpoint(directory.with_name("without")).groups(storages())))


def test_the_graph_has_these_parameters(small, expected) -> None:
    source = QuantizedCheckpoint(Checkpoint(small[0]), storages("none", 32, "none"))
    spec = spec_of(source, torch.bfloat16)
    groups = parameter_groups(spec)
    assert len(groups) == count_groups(source.config) == 5
    assert [sorted(group) for group in expected] == [sorted(names) for names in groups]
    for group in expected:
        for name, tensor in group.items():
            assert tuple(tensor.shape) == spec[name][1], name


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp."])
@pytest.mark.parametrize("fused", [(True, True), (True, False), (False, True), (False, False)])
def test_forms(small, expected, tmp_path: Path, prefix: str, fused: tuple[bool, bool]) -> None:
    """Both prefixes, and experts fused or apart, in the head as in the model or in another way."""
    _, config, tensors = small
    trunk, head = trunk_of(tensors), head_of(tensors)
    trunk, head = (
        part if together else per_expert(part)
        for part, together in zip((trunk, head), fused, strict=True)
    )
    head = {prefix + name.removeprefix("mtp."): tensor for name, tensor in head.items()}
    checkpoint = Checkpoint(write(tmp_path / "c", config, trunk, head))
    assert checkpoint.skipped == 0
    assert_equal(parameters(checkpoint.groups(storages())), expected)


def test_a_head_in_block_fp8_is_the_product(small, tmp_path: Path) -> None:
    _, config, tensors = small
    stored, meant = to_fp8(tensors)
    assert stored[f"{LAYER}.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    section = {"quantization_config": FP8}
    actual = Checkpoint(write(tmp_path / "fp8", config | section, stored))
    wanted = Checkpoint(write(tmp_path / "float", config, meant))
    assert_equal(parameters(actual.groups(storages())), parameters(wanted.groups(storages())))


@pytest.mark.filterwarnings("ignore:.*become INT4, too")
@pytest.mark.parametrize("kind", ["quantized", "as it was trained"])
def test_a_head_beside_gptq(tmp_path: Path, kind: str) -> None:
    """It has the storage of the model's experts; where it is quantized, with its own values."""
    widths = {"mtp_num_hidden_layers": 1, "shared_expert_intermediate_size": 64}
    config, tensors = make_small(tmp_path / "small", **widths)
    stored, meant = to_gptq(tensors, EXPERTS)
    if kind != "quantized":
        stored = trunk_of(stored) | per_expert(head_of(tensors))
        meant = trunk_of(meant) | per_expert(head_of(tensors))
    section = {"quantization_config": GPTQ}
    actual = quantized(write(tmp_path / "gptq", config | section, stored))
    floats = QuantizedCheckpoint(
        Checkpoint(write(tmp_path / "float", config, meant)), actual.storages
    )
    *_, layer, _, head = actual.groups()
    *_, wanted = floats.groups()
    assert layer["layers.1.mlp.experts.w13_scale"].dtype == torch.float16
    assert head.keys() == wanted.keys()
    assert head[f"{LAYER}.mlp.experts.w13_scale"].dtype == torch.float16
    if kind != "quantized":
        assert_equal([head], [wanted])
        return
    name = f"{LAYER}.mlp.experts.0.down_proj"
    scale = stored[f"{name}.scales"].t()
    assert torch.equal(head[f"{LAYER}.mlp.experts.w2_scale"][0], scale)
    assert torch.equal(head["mtp.fc_hidden.weight"], wanted["mtp.fc_hidden.weight"])


def test_a_checkpoint_without_a_head(small, expected, tmp_path: Path) -> None:
    """config.json may promise a head that is not there, and a head that it denies is not read."""
    _, config, tensors = small
    promised = Checkpoint(write(tmp_path / "promised", config, trunk_of(tensors)))
    none = {"mtp_num_hidden_layers": 0}
    denied = Checkpoint(write(tmp_path / "denied", config | none, tensors))
    silent = {key: value for key, value in config.items() if key not in none}
    silent = Checkpoint(write(tmp_path / "silent", silent, tensors))
    assert (promised.skipped, denied.skipped, silent.skipped) == (0, 19, 19)
    for checkpoint in (promised, denied, silent):
        assert checkpoint.config.mtp_num_hidden_layers == 0
        assert_equal(parameters(checkpoint.groups(storages())), expected[:-1])
    write_bundle(quantized(tmp_path / "promised"), tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.config == promised.config
    assert not any(name.startswith("mtp.") for group in bundle.groups() for name in group)
    assert "mtp_num_hidden_layers" not in json.loads(
        (tmp_path / "bundle" / "config.json").read_text()
    ).pop("et_moe")


@pytest.fixture
def bundle(small, tmp_path: Path) -> Path:
    calls = []
    source = quantized(small[0])
    write_bundle(source, tmp_path / "bundle", lambda: calls.append(1))
    assert len(calls) == count_groups(source.config)
    return tmp_path / "bundle"


def test_a_bundle_keeps_the_head(small, bundle: Path) -> None:
    read, source = Bundle(bundle), quantized(small[0])
    assert read.config == source.config and read.config.mtp_num_hidden_layers == 1
    actual, wanted = ([dict(sorted(g.items())) for g in s.groups()] for s in (read, source))
    assert_equal(actual, wanted)
    head = load_file(bundle / "model-00005-of-00005.safetensors")
    assert head.keys() == wanted[-1].keys()
    assert head["mtp.fc_embedding.weight"].shape == (32, 16)
    assert head["mtp.fc_embedding.weight"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "unexpected tensor mtp.fc_embedding.scale"),
        (2, "config.json: et_moe.mtp_num_hidden_layers is 2, expected 0 or that of the model, 1"),
        (True, "config.json: et_moe.mtp_num_hidden_layers is True, expected 0 or that of the"),
    ],
)
def test_a_bundle_that_says_another_thing(bundle: Path, value: object, message: str) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["et_moe"]["mtp_num_hidden_layers"] = value
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        Bundle(bundle)
    assert message in str(caught.value)


def test_a_bundle_that_lost_its_head(bundle: Path) -> None:
    index = bundle / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weights = content["weight_map"]
    content["weight_map"] = {n: f for n, f in weights.items() if not n.startswith("mtp.")}
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"missing tensor mtp\.fc_embedding\.scale"):
        Bundle(bundle)


def test_programs_are_the_same_with_and_without_a_head(small, bundle: Path, tmp_path) -> None:
    directory, config, tensors = small
    write(tmp_path / "c", config, trunk_of(tensors))
    shutil.copy(directory / "generation_config.json", tmp_path / "c")
    options = ExportOptions(max_seq_len=32, max_sequences=1)
    files = {}
    for name, source in (("with", Bundle(bundle)), ("without", quantized(tmp_path / "c"))):
        export(source, tmp_path / name, options)
        files[name] = files_of(tmp_path / name)
    for file in ("model.pte", "model.ptd"):
        assert files["with"][file] == files["without"][file], file


def change(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


DAMAGE = {
    "no fc": (lambda t: t.pop("mtp.fc.weight"), "missing tensors: mtp.fc.weight"),
    "no norm": (lambda t: t.pop("mtp.norm.weight"), "missing tensors: mtp.norm.weight"),
    "no expert": (
        lambda t: t.pop(f"{LAYER}.mlp.experts.down_proj"),
        f"missing tensors: {LAYER}.mlp.experts.down_proj",
    ),
    "fc alone": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("mtp.") and "fc.w" not in n],
        f"missing tensors: {LAYER}.input_layernorm.weight, ",
    ),
    "half an fc": (
        change("mtp.fc.weight", lambda w: w[:, :32].clone()),
        "mtp.fc.weight has shape (32, 32), config.json asks (32, 64)",
    ),
    "narrow norm": (
        change("mtp.pre_fc_norm_hidden.weight", lambda w: w[:8].clone()),
        "mtp.pre_fc_norm_hidden.weight has shape (8,), config.json asks (32,)",
    ),
    "dtype": (
        change("mtp.fc.weight", lambda w: w.double()),
        "mtp.fc.weight has dtype F64, expected one of",
    ),
    "a second layer": (
        lambda t: t.update({"mtp.layers.1.input_layernorm.weight": torch.zeros(32)}),
        "unexpected tensors: mtp.layers.1.input_layernorm.weight",
    ),
    "linear attention": (
        lambda t: t.update({f"{LAYER}.linear_attn.A_log": torch.zeros(4)}),
        f"unexpected tensors: {LAYER}.linear_attn.A_log",
    ),
    "twice": (
        lambda t: t.update({"model.mtp.fc.weight": torch.zeros(32, 64)}),
        "mtp.fc.weight is there twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_heads(small, tmp_path: Path, damage: str) -> None:
    _, config, tensors = small
    tensors, (apply, message) = dict(tensors), DAMAGE[damage]
    apply(tensors)
    with pytest.raises(ConfigError) as caught:
        Checkpoint(write(tmp_path / "c", config, tensors))
    assert message in str(caught.value) and str(tmp_path / "c") in str(caught.value)


def test_a_head_that_is_not_finite(small, tmp_path: Path) -> None:
    _, config, tensors = small
    norm = tensors["mtp.norm.weight"].clone()
    norm[3] = float("nan")
    source = quantized(write(tmp_path / "c", config, tensors | {"mtp.norm.weight": norm}))
    with pytest.raises(ConfigError, match=r"c: mtp\.norm\.weight: .* not finite"):
        list(source.groups())


@pytest.mark.parametrize("model", [MODEL, QWEN3_NEXT], ids=["qwen3_5_moe", "qwen3_next"])
def test_a_random_head_is_made_and_read(tmp_path: Path, model) -> None:
    """The other tensors are those of a checkpoint without it. Qwen3-Next's head has a mixture even
    where the model's layers are dense."""
    overrides = {"mtp_num_hidden_layers": 1}
    if model is QWEN3_NEXT:
        overrides |= {"decoder_sparse_step": 2}
    make_checkpoint(tmp_path / "with", model, "tiny", seed=3, layers=1, overrides=overrides)
    overrides["mtp_num_hidden_layers"] = 0
    make_checkpoint(tmp_path / "without", model, "tiny", seed=3, layers=1, overrides=overrides)
    file = "model-00001-of-00001.safetensors"
    tensors, without = (load_file(tmp_path / name / file) for name in ("with", "without"))
    assert_equal([trunk_of(tensors)], [without])
    assert len(head_of(tensors)) == 19
    assert tensors["mtp.pre_fc_norm_hidden.weight"].float().std() > 0.03
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert config["mtp_num_hidden_layers"] == 1
    *_, head = Checkpoint(tmp_path / "with").groups(storages())
    assert f"{LAYER}.mlp.experts.w13" in head


def test_published_configurations_of_qwen3_next(tmp_path: Path) -> None:
    """They have no key for the head: its tensors tell."""
    for layers in (0, 1):
        folder, overrides = tmp_path / str(layers), {"mtp_num_hidden_layers": layers}
        make_checkpoint(folder, QWEN3_NEXT, "tiny", layers=1, overrides=overrides)
        config = json.loads((folder / "config.json").read_text())
        del config["mtp_num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps(config))
        source = QuantizedCheckpoint(Checkpoint(folder), choose_storages(QWEN3_NEXT.parts))
        write_bundle(source, tmp_path / f"{layers} bundle")
        for read in (Checkpoint(folder), Bundle(tmp_path / f"{layers} bundle")):
            assert read.config.mtp_num_hidden_layers == layers


def test_the_command_line_makes_one(tmp_path: Path) -> None:
    flags = ["make-checkpoint", "--layers", "1", "--mtp", "--output-dir"]
    for name, further in (("checkpoint", []), ("bundle", ["--quantized", "--recipe", "4w"])):
        done = CliRunner().invoke(app, [*flags, str(tmp_path / name), *further])
        assert done.exit_code == 0, done.output
    assert Checkpoint(tmp_path / "checkpoint").config.mtp_num_hidden_layers == 1
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.config.mtp_num_hidden_layers == 1
    *_, head = bundle.groups()
    assert head["mtp.fc_hidden.weight"].shape == (128, 64)
