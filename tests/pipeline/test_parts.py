"""The parts of a model and how they are stored: recipes, flags, and what is said of them."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import make_small, storages

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.examples.qwen3_next.model import MODEL as NEXT
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, constant_methods, plan_weights, resolve_sizes
from et_moe.pipeline.footprint import footprint
from et_moe.pipeline.make_bundle import make_bundle
from et_moe.pipeline.quantize import QuantizedCheckpoint, meta_graph
from et_moe.pipeline.storage import Dense, Int4, Int8PerRow, Precision, choose_storages

W4, W8, NONE = Int4(128), Int8PerRow(), Dense()
LINEAR = ("attention", "linear_attention", "shared_expert", "head", "dense_mlp")


@pytest.mark.parametrize(
    ("recipe", "experts", "linear", "embedding"),
    [("4w", W4, W4, W8), ("mixed", W4, W8, W8), ("dense", NONE, NONE, NONE)],
)
def test_recipes(recipe: str, experts, linear, embedding) -> None:
    expected = {"embedding": embedding, "experts": experts} | dict.fromkeys(LINEAR, linear)
    assert choose_storages(NEXT.parts, recipe=recipe) == expected
    del expected["dense_mlp"]
    assert choose_storages(MODEL.parts, recipe=recipe) == expected


def test_a_part_goes_before_qlinear_and_that_before_the_recipe() -> None:
    chosen = choose_storages(
        MODEL.parts,
        "none",
        64,
        recipe="mixed",
        by_part={"experts": "4w", "head": "8w", "attention": None},
    )
    assert chosen == {
        "embedding": W8,
        "attention": NONE,
        "linear_attention": NONE,
        "experts": Int4(64),
        "shared_expert": NONE,
        "head": W8,
    }


def test_embedding_in_int4() -> None:
    """By its own flag alone, with the groups of the others."""
    chosen = choose_storages(MODEL.parts, group_size=64, qembedding="4w", recipe="mixed")
    assert chosen["embedding"] == chosen["experts"] == Int4(64) and chosen["head"] == W8
    assert choose_storages(MODEL.parts, "4w")["embedding"] == W8


def test_experts_in_int8() -> None:
    assert set(choose_storages(MODEL.parts, "8w").values()) == {W8}
    chosen = choose_storages(MODEL.parts, by_part={"experts": "8w"})
    assert chosen["experts"] == W8 and chosen["shared_expert"] == W4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"recipe": "8w"}, r"recipe '8w': expected one of \('4w', 'mixed', 'dense'\)"),
        ({"qlinear": "2w"}, r"qlinear '2w': expected one of \['4w', '8w', 'none'\] for attention"),
        ({"by_part": {"experts": "2w"}}, r"qexperts '2w': expected one of \['4w', '8w', 'none'\]"),
        (
            {"by_part": {"shared_expert": "2w"}},
            r"qshared-expert '2w': expected one of \['4w', '8w'",
        ),
        (
            {"qembedding": "2w"},
            r"qembedding '2w': expected one of \['4w', '8w', 'none'\] for embed",
        ),
    ],
)
def test_values_are_refused_by_flag(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_storages(MODEL.parts, **flags)


def test_flags_of_the_command_line(run, tmp_path: Path) -> None:
    make_small(tmp_path / "c", shared_expert_intermediate_size=64)
    flags = ("--recipe", "mixed", "--qhead", "none", "--qshared-expert", "4w", "--qembedding", "4w")
    flags += ("--qlinear-group-size", 32, "--qattention", "none", "--qlinear-attention", "4w")
    code, _, err = run(
        "quantize", "--model-dir", tmp_path / "c", *flags, "--output-dir", tmp_path / "b"
    )
    assert code == 0, err
    bundle = Bundle(tmp_path / "b")
    taken = footprint(meta_graph(bundle.config, Precision(bundle.storages)))
    assert f"{taken.bits_per_weight:.2f} bits a weight, " in err
    assert f"{taken.bytes_per_token / 1e6:,.1f} MB read for a decoded token" in err
    assert bundle.storages == {
        "embedding": Int4(32),
        "attention": NONE,
        "linear_attention": Int4(32),
        "experts": Int4(32),
        "shared_expert": Int4(32),
        "head": NONE,
    }
    for flag in ("--qexperts", "--qattention", "--qshared-expert", "--qembedding", "--recipe"):
        value = "mixed" if flag == "--recipe" else "none"
        arguments = ("--prequantized", tmp_path / "b", flag, value, "--output-dir", tmp_path / "p")
        code, _, err = run("export", *arguments)
        assert code == 2 and f"{flag} is fixed by the bundle" in err


def test_the_default_is_mixed(run, tmp_path: Path) -> None:
    make_small(tmp_path / "c", shared_expert_intermediate_size=64)
    flags = ("--model-dir", tmp_path / "c", "--qlinear-group-size", 32, "--output-dir")
    assert run("quantize", *flags, tmp_path / "b")[0] == 0
    expected = choose_storages(MODEL.parts, recipe="mixed", group_size=32)
    assert Bundle(tmp_path / "b").storages == expected
    assert run("quantize", "--qlinear", "4w", *flags, tmp_path / "d")[0] == 0
    assert Bundle(tmp_path / "d").storages == choose_storages(MODEL.parts, group_size=32)


def test_recipe_of_a_random_bundle(run, tmp_path: Path) -> None:
    common = ("make-checkpoint", "--recipe", "mixed", "--layers", 1)
    code, _, err = run(*common, "--output-dir", tmp_path / "c")
    assert code == 2 and "--recipe needs --quantized" in err
    assert run(*common, "--quantized", "--output-dir", tmp_path / "b")[0] == 0
    assert Bundle(tmp_path / "b").storages == choose_storages(MODEL.parts, recipe="mixed")


def test_the_shared_expert_is_a_part_of_the_tables_or_apart(tmp_path: Path) -> None:
    """Whatever it is, the weights are those of the checkpoint."""
    make_small(tmp_path / "c")
    checkpoint = Checkpoint(tmp_path / "c")
    joined = dict(storages("none", 32, "none"))
    apart = joined | {"shared_expert": W8}
    names = {}
    for kind, chosen in (("joined", joined), ("apart", apart)):
        groups = QuantizedCheckpoint(checkpoint, chosen).groups()
        names[kind] = {name: tensor for group in groups for name, tensor in group.items()}
    mlp = "layers.0.mlp"
    assert names["joined"][f"{mlp}.experts.w2"].shape == (5, 32, 32)
    assert names["apart"][f"{mlp}.experts.w2"].shape == (3, 32, 32)
    new = names["apart"].keys() - names["joined"].keys()
    leaves = ("gate_up_proj.scale", "gate_up_proj.weight", "down_proj.scale", "down_proj.weight")
    assert new == {f"layers.{i}.mlp.shared_expert.{leaf}" for i in (0, 1) for leaf in leaves}
    assert names["apart"][f"{mlp}.shared_expert.gate_up_proj.weight"].shape == (80, 32)
    assert names["apart"][f"{mlp}.shared_expert.down_proj.weight"].shape == (32, 40)
    same = names["apart"].keys() & names["joined"].keys()
    for name in same:
        rows = slice(0, len(names["apart"][name]))
        assert torch.equal(names["apart"][name], names["joined"][name][rows]), name


def test_footprint_of_a_model_by_hand(tmp_path: Path) -> None:
    """One layer of linear attention, 8 experts of which 2 are chosen, all of width 128."""
    make_bundle(tmp_path, MODEL, "tiny", 0, layers=1, recipe="mixed")
    bundle = Bundle(tmp_path)
    c = bundle.config
    taken = footprint(meta_graph(c, Precision(bundle.storages)))
    h, inner, vocabulary = 128, 128, 512
    rows = c.conv_channels + c.linear_value_width + 2 * c.linear_num_value_heads
    # Weights and rows with a bfloat16 scale each.
    always = [(rows * h, rows), (c.linear_value_width * h, h), (2 * inner * h, 2 * inner)]
    always += [(h * inner, h), (vocabulary * h, vocabulary)]
    dense = c.conv_channels * c.linear_conv_kernel_dim + c.linear_value_head_dim + 3 * h + 9 * h
    float32 = 2 * c.linear_num_value_heads
    experts = 8 * 3 * inner * h
    experts_bytes = experts // 2 + 2 * experts // 128
    always_bytes = sum(n + 2 * scales for n, scales in always) + 2 * dense + 4 * float32
    weights = sum(n for n, _ in always) + dense + float32 + experts + vocabulary * h
    assert taken.weights == weights
    assert taken.size == always_bytes + experts_bytes + vocabulary * h + 2 * vocabulary
    assert taken.bytes_per_token == always_bytes + experts_bytes // 4 + h + 2
    assert taken.bits_per_weight == round(8 * taken.size / weights, 3)
    int4 = Precision(bundle.storages | {"embedding": Int4(32)})
    smaller = footprint(meta_graph(c, int4))
    assert smaller.weights == weights
    assert smaller.size == taken.size - vocabulary * (h // 2 + 2 - 2 * h // 32)
    assert smaller.bytes_per_token == taken.bytes_per_token - (h // 2 + 2 - 2 * h // 32)


def test_a_program_says_what_its_weights_take(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    precision = Precision(bundle.storages, dtype=torch.float32)
    constants = constant_methods(
        bundle.config, precision, resolve_sizes(bundle.config, ExportOptions())
    )
    taken = footprint(meta_graph(bundle.config, precision))
    assert constants["get_bits_per_weight"] == taken.bits_per_weight
    assert constants["get_bytes_per_token"] == taken.bytes_per_token
    assert json.dumps(constants)


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        (
            W8,
            {
                "w13": (torch.int8, (5, 2, 1, 2, 64, 128)),
                "w13_scale": (torch.bfloat16, (5, 2, 1, 2, 64)),
                "w2": (torch.int8, (5, 2, 1, 64, 128)),
                "w2_scale": (torch.bfloat16, (5, 2, 1, 64)),
            },
        ),
        (
            NONE,
            {
                "w13": (torch.bfloat16, (5, 2, 1, 2, 64, 128)),
                "w2": (torch.bfloat16, (5, 2, 1, 64, 128)),
            },
        ),
    ],
)
def test_experts_that_are_not_int4_for_cuda(tmp_path: Path, experts, expected: dict) -> None:
    """The shared expert, two experts wide, lies in the tables; floats are cast to the model's
    dtype."""
    make_small(tmp_path)
    chosen = storages("4w", 32) | {"experts": experts, "shared_expert": experts}
    source = QuantizedCheckpoint(Checkpoint(tmp_path), chosen)
    plan = plan_weights(source, ExportOptions("cuda", torch.bfloat16))
    prefix = "layers.0.mlp.experts."
    found = {n.removeprefix(prefix): e for n, e in plan.spec.items() if n.startswith(prefix)}
    assert found == expected
    (group,) = [group for group in source.groups() if f"{prefix}w2" in group]
    group = {
        n: t.float() if n.endswith(("w13", "w2")) and experts is NONE else t
        for n, t in group.items()
    }
    packed = {n: (t.dtype, tuple(t.shape)) for n, t in plan.pack(group) if n.startswith(prefix)}
    assert packed == {prefix + name: entry for name, entry in expected.items()}
