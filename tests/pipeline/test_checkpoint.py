"""Checkpoints in every form that Hugging Face writes, and damaged ones."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import (
    assert_equal,
    assert_mutations_are_survived,
    make_small,
    parameters,
    per_expert,
    renamed,
    spec_of,
    storages,
    write,
)
from safetensors.torch import save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.examples.qwen3_5_moe.tensors import inverse_frequencies
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.quantize import QuantizedCheckpoint, parameter_groups

MIXER = "model.layers.0.linear_attn"
MLP = "model.layers.0.mlp"
CONV = f"{MIXER}.conv1d.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """Directory, config and tensors of a small checkpoint in one file."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    return directory, *make_small(directory)


@pytest.fixture(scope="module")
def expected(small):
    """Its parameters as read, which `test_parameters` compares with the tensors themselves."""
    return parameters(Checkpoint(small[0]).groups(storages()))


def test_parameters(small, expected) -> None:
    """Each parameter is put together from the tensors it stands for."""
    directory, _, tensors = small
    checkpoint = Checkpoint(directory)
    assert checkpoint.skipped == 0
    embed, linear, full, head = expected
    assert torch.equal(embed["embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(head["norm.weight"], tensors["model.norm.weight"])
    assert torch.equal(head["lm_head.weight"], tensors["lm_head.weight"])
    pieces = [tensors[f"{MIXER}.in_proj_{p}.weight"] for p in ("qkv", "z", "b", "a")]
    assert torch.equal(linear["layers.0.linear_attn.in_proj.weight"], torch.cat(pieces))
    taps = linear["layers.0.linear_attn.conv1d.weight"]
    assert torch.equal(taps, tensors[f"{MIXER}.conv1d.weight"][:, 0])
    for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
        assert torch.equal(linear[f"layers.0.linear_attn.{name}"], tensors[f"{MIXER}.{name}"])
    attention = "model.layers.1.self_attn"
    pieces = [tensors[f"{attention}.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(full["layers.1.self_attn.qkv_proj.weight"], torch.cat(pieces))
    for name in ("q_norm", "k_norm", "o_proj"):
        stored = full[f"layers.1.self_attn.{name}.weight"]
        assert torch.equal(stored, tensors[f"{attention}.{name}.weight"])
    gates = [tensors[f"{MLP}.gate.weight"], tensors[f"{MLP}.shared_expert_gate.weight"]]
    assert torch.equal(linear["layers.0.mlp.gate.weight"], torch.cat(gates))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        for layer, group in enumerate((linear, full)):
            name = f"layers.{layer}.{norm}.weight"
            assert torch.equal(group[name], tensors[f"model.{name}"])
    assert sum(map(math.prod, MODEL.checkpoint_shapes(checkpoint.config).values())) == sum(
        t.numel() for t in tensors.values()
    )


def test_the_model_has_these_parameters(small, expected) -> None:
    """Names, shapes and the order of groups are those of the model without quantization."""
    source = QuantizedCheckpoint(Checkpoint(small[0]), storages("none", 32, "none"))
    spec = spec_of(source, torch.bfloat16)
    groups = parameter_groups(spec)
    assert [sorted(group) for group in expected] == [sorted(names) for names in groups]
    for group in expected:
        for name, tensor in group.items():
            assert tuple(tensor.shape) == spec[name][1], name


@pytest.mark.parametrize("width", [8, 32, 40, 64, 100])
def test_the_shared_expert_fills_slots_of_the_routed_width(tmp_path: Path, width: int) -> None:
    """It computes the same in slots of width 32, whether it is narrower or wider than a slot."""
    make_small(tmp_path / "c", shared_expert_intermediate_size=width)
    _, tensors = make_small(tmp_path / "d", shared_expert_intermediate_size=width)
    group = parameters(Checkpoint(tmp_path / "c").groups(storages()))[1]
    w13, w2 = (group[f"layers.0.mlp.experts.{w}"].float() for w in ("w13", "w2"))
    assert torch.equal(w13[:3], tensors[f"{MLP}.experts.gate_up_proj"].float())
    assert torch.equal(w2[:3], tensors[f"{MLP}.experts.down_proj"].float())
    slots = -(-width // 32)
    assert w13.shape == (3 + slots, 64, 32) and w2.shape == (3 + slots, 32, 32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    gate, up, down = (
        tensors[f"{MLP}.shared_expert.{p}_proj.weight"].float() for p in ("gate", "up", "down")
    )
    reference = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    total = torch.zeros_like(reference)
    for e in range(3, 3 + slots):
        g, u = (x @ w13[e].T).chunk(2, dim=-1)
        total += (F.silu(g) * u) @ w2[e].T
    torch.testing.assert_close(total, reference, rtol=1e-5, atol=1e-7)


def test_inverse_frequencies_are_hugging_faces(small, expected) -> None:
    directory, *_ = small
    rope = Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig.from_pretrained(directory))
    assert torch.equal(inverse_frequencies(Checkpoint(directory).config), rope.inv_freq)
    assert torch.equal(expected[2]["layers.1.self_attn.inv_freq"], rope.inv_freq)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_forms(small, expected, tmp_path: Path, prefix: str, fused: bool, shards: int) -> None:
    """One file or several, fused or single experts, and either prefix give the same parameters."""
    _, config, tensors = small
    form = renamed(tensors if fused else per_expert(tensors), prefix)
    pieces = [dict(list(form.items())[i::shards]) for i in range(shards)]
    checkpoint = Checkpoint(write(tmp_path / "c", config, *pieces))
    assert_equal(parameters(checkpoint.groups(storages())), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(small, expected, tmp_path: Path, dtype: torch.dtype) -> None:
    _, config, tensors = small
    write(tmp_path / "c", config, {n: t.to(dtype) for n, t in tensors.items()})
    wanted = [
        {n: t if n.endswith("inv_freq") else t.to(dtype) for n, t in group.items()}
        for group in expected
    ]
    assert_equal(parameters(Checkpoint(tmp_path / "c").groups(storages())), wanted)


def test_vision_and_mtp_tensors_are_skipped_and_counted(small, expected, tmp_path: Path) -> None:
    _, config, tensors = small
    extra = {
        # Tensors of the text model may not have this dtype.
        f"{prefix}.{i}.weight": torch.zeros(3, dtype=torch.float64)
        for prefix in ("model.visual.blocks", "visual.merger", "mtp.layers", "model.mtp.fc")
        for i in range(2)
    }
    checkpoint = Checkpoint(write(tmp_path / "c", config, tensors, extra))
    assert checkpoint.skipped == 8
    assert_equal(parameters(checkpoint.groups(storages())), expected)


@pytest.mark.parametrize("head_in_file", [True, False])
def test_tied_embeddings(small, tmp_path: Path, head_in_file: bool) -> None:
    """The head is the embedding unless the file has a head too: Hugging Face does not tie the two
    if they differ."""
    _, config, tensors = small
    if not head_in_file:
        tensors = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    write(tmp_path / "c", config | {"tie_word_embeddings": True}, tensors)
    groups = parameters(Checkpoint(tmp_path / "c").groups(storages()))
    source = "lm_head.weight" if head_in_file else "model.embed_tokens.weight"
    assert torch.equal(groups[-1]["lm_head.weight"], tensors[source])
    theirs = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "c").lm_head.weight
    assert torch.equal(groups[-1]["lm_head.weight"], theirs)


def test_two_sets_of_weights(small, tmp_path: Path) -> None:
    _, config, tensors = small
    write(tmp_path / "c", config, tensors, {"model.visual.a": torch.zeros(1)})
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"holds model\.safetensors and the shards of .*index"):
        Checkpoint(tmp_path / "c")


DAMAGE = {
    "missing": (lambda t: t.pop(CONV), ["missing tensors: layers.0.linear_attn.conv1d.weight"]),
    "missing head": (lambda t: t.pop("lm_head.weight"), ["missing tensors: lm_head.weight"]),
    "missing layer": (
        lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n],
        ["missing tensors: layers.1.input_layernorm.weight, ", " and 7 more"],
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(1)}),
        ["unexpected tensors: model.layers.0.extra.weight"],
    ),
    "layer too many": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.zeros(32)}),
        ["unexpected tensors: model.layers.2.input_layernorm.weight"],
    ),
    "twice": (
        lambda t: t.update({"model.language_model.norm.weight": torch.zeros(32)}),
        ["model.safetensors: model.", "norm.weight is there twice"],
    ),
    "shape": (
        lambda t: t.update({CONV: torch.zeros(5, 1, 4)}),
        [f"model.safetensors: {CONV} has shape (5, 1, 4), config.json asks (128, 1, 4)"],
    ),
    "transposed": (
        lambda t: t.update({f"{MIXER}.in_proj_z.weight": torch.zeros(32, 96)}),
        [f"model.safetensors: {MIXER}.in_proj_z.weight has shape (32, 96)", "asks (96, 32)"],
    ),
    "dtype": (
        lambda t: t.update({CONV: t[CONV].to(torch.float64)}),
        [f"model.safetensors: {CONV} has dtype F64, expected one of ['BF16', 'F16', 'F32']"],
    ),
    "integers": (
        lambda t: t.update({CONV: t[CONV].to(torch.int8)}),
        [f"model.safetensors: {CONV} has dtype I8, expected one of ['BF16', 'F16', 'F32']"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_tensors(small, tmp_path: Path, damage: str) -> None:
    _, config, tensors = small
    tensors = dict(tensors)
    change, parts = DAMAGE[damage]
    change(tensors)
    directory = write(tmp_path / "c", config, tensors)
    with pytest.raises(ConfigError) as caught:
        Checkpoint(directory)
    for part in [str(directory), *parts]:
        assert part in str(caught.value)


def test_missing_experts_are_listed_shortly(small, tmp_path: Path) -> None:
    _, config, tensors = small
    form = per_expert(tensors)
    del form[f"{MLP}.experts.1.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"missing tensors: layers\.0\.mlp\.experts\.1\.up_proj"):
        Checkpoint(write(tmp_path / "c", config, form))
    config = config | {"num_experts": 1000}
    with pytest.raises(ConfigError) as caught:
        Checkpoint(write(tmp_path / "d", config, form))
    assert len(str(caught.value)) < 1000 and "and 5975 more" in str(caught.value)


def test_damaged_safetensors(small, tmp_path: Path) -> None:
    """The file is named, whatever is wrong with its header."""
    _, config, tensors = small
    write(tmp_path / "c", config, tensors)
    file = tmp_path / "c" / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damaged = {
        "empty": b"",
        "short": whole[:5],
        "cut in the header": whole[: header // 2],
        "cut in the data": whole[:-1],
        "longer": whole + b"\0",
        "huge header": (1 << 62).to_bytes(8, "little") + whole[8:],
        "header beyond the file": (len(whole)).to_bytes(8, "little") + whole[8:],
        "header flipped": whole[:20] + bytes([whole[20] ^ 0x80]) + whole[21:],
        "offsets": whole.replace(b'"data_offsets":[0,', b'"data_offsets":[2,', 1),
    }
    for name, content in damaged.items():
        assert content != whole, name
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=f"^{file}: not a valid safetensors file: "):
            Checkpoint(tmp_path / "c")
    file.unlink()
    with pytest.raises(ConfigError, match=r"c: neither model\.safetensors nor .*index\.json is"):
        Checkpoint(tmp_path / "c")
    file.mkdir()
    with pytest.raises(ConfigError, match=r"c: neither model\.safetensors nor .*index\.json is"):
        Checkpoint(tmp_path / "c")


OUTSIDE = ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "x\0y", "\ud800", 3, None, []]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_the_index_names_files_beside_it(small, tmp_path: Path, name: object) -> None:
    _, config, tensors = small
    save_file(tensors, tmp_path / "x.safetensors")  # it is there, but outside of the checkpoint
    write(tmp_path / "c", config, tensors, {"model.visual.a": torch.zeros(1)})
    index = tmp_path / "c" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"^{re.escape(str(tmp_path / 'c'))}.*index.json"):
        Checkpoint(tmp_path / "c")


def test_damaged_index(small, tmp_path: Path) -> None:
    _, config, tensors = small
    write(tmp_path / "c", config, tensors, {"model.visual.a": torch.zeros(1)})
    index = tmp_path / "c" / "model.safetensors.index.json"
    whole = index.read_text()
    shard = tmp_path / "c" / "model-00001-of-00002.safetensors"
    for text, message in {
        whole[:-9]: f"{index}: not readable as JSON",
        "[]": f"{index}: expected a JSON object, found list",
        "{}": f"{index}: weight_map must map tensor names to files",
        '{"weight_map": {}}': f"{index}: weight_map must map tensor names to files",
        '{"weight_map": ["x"]}': f"{index}: weight_map must map tensor names to files",
        whole.replace("00001-of", "00009-of"): "model-00009-of-00002.safetensors: no such file, "
        "named by model.safetensors.index.json",
    }.items():
        index.write_text(text)
        with pytest.raises(ConfigError) as caught:
            Checkpoint(tmp_path / "c")
        assert message in str(caught.value)
    index.write_text(whole)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"^{shard}: no such file, named by model.safetensors"):
        Checkpoint(tmp_path / "c")


@pytest.mark.parametrize("shards", [1, 3])
def test_mutated_files(tmp_path: Path, shards: int) -> None:
    """2000 damaged copies of each file are read or refused with a message (see the script)."""
    config, tensors = make_small(tmp_path / "c", vocab_size=261)
    files = ["config.json", "model.safetensors"]
    if shards > 1:
        (tmp_path / "c" / "model.safetensors").unlink()
        write(tmp_path / "c", config, *(dict(list(tensors.items())[i::3]) for i in range(3)))
        files = ["model.safetensors.index.json"]
    assert_mutations_are_survived("checkpoint", tmp_path / "c", 2000, *files)
