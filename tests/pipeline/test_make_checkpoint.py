"""Random checkpoints against Hugging Face's model, and their failure modes."""

import errno
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import make_checkpoint as module
from et_moe.pipeline.make_checkpoint import make_checkpoint, tensor_shapes, text_config

# The form of the 35B preset at a size for tests.
SMALL = {
    "vocab_size": 320,
    "eos_token_id": 7,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, read through the index; each shard must hold just what the index says."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(directory / file)
        assert shard.keys() == {n for n, f in index["weight_map"].items() if f == file}
        tensors |= shard
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    return tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(directory, MODEL, "tiny", seed=3)
    return directory


def check_loads_and_runs(cls: type, directory: Path) -> torch.nn.Module:
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    for problem, keys in info.items():
        assert not keys, f"{problem}: {keys}"
    assert model.dtype == torch.bfloat16
    ids = torch.arange(70)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    assert logits.isfinite().all() and logits.float().std() > 0.01
    return model


def test_tiny_loads_in_hugging_face(tiny: Path) -> None:
    model = check_loads_and_runs(AutoModelForCausalLM, tiny)
    assert isinstance(model, Qwen3_5MoeForCausalLM)
    for name, tensor in load_weights(tiny).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.generation_config.eos_token_id == [258, 256]
    assert model.config.eos_token_id == 256


def test_tiny_tokenizer_is_bytes_and_added_tokens(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "Hé\n\t\u0000 \U0001f600<think>x</think><|im_end|>"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len("Hé\n\t\0 \U0001f600x".encode()) + 3
    assert ids[-1] == 258
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")
    assert AutoTokenizer.from_pretrained(tiny)(text).input_ids == ids


def test_the_35b_form_loads_in_hugging_face(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "small", MODEL, "35b", layers=4, overrides=SMALL)
    assert not (tmp_path / "small" / "tokenizer.json").exists()
    check_loads_and_runs(AutoModelForCausalLM, tmp_path / "small")


def test_the_35b_shape_is_hugging_faces() -> None:
    """Names and shapes of all 40 layers, against the model built from the defaults of its config
    class, which are those of Qwen3.5-35B-A3B."""
    with torch.device("meta"):
        model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig())
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.visual.")
    }
    text = text_config(MODEL, "35b")
    assert tensor_shapes(MODEL, text, "model.language_model.") == expected
    assert text["layer_types"] == model.config.text_config.layer_types
    assert text["num_experts_per_tok"] == 8 and text["max_position_embeddings"] == 262144


def test_the_35b_config_is_the_multimodal_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "small", MODEL, "35b", layers=5, overrides=SMALL)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert config["text_config"]["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    assert config["text_config"]["eos_token_id"] == 7
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7]
    kinds = ["linear_attention"] * 3 + ["full_attention", "linear_attention"]
    assert config["text_config"]["layer_types"] == kinds
    assert config["text_config"]["num_hidden_layers"] == 5
    assert Qwen3_5MoeConfig.from_pretrained(tmp_path / "small").text_config.num_experts == 4


def test_values_depend_on_seed_and_name_only(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "again", MODEL, "tiny", seed=3)
    for path in sorted(tiny.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    make_checkpoint(tmp_path / "short", MODEL, "tiny", seed=3, layers=2)
    make_checkpoint(tmp_path / "other", MODEL, "tiny", seed=4, layers=2)
    whole, short = load_weights(tiny), load_weights(tmp_path / "short")
    other = load_weights(tmp_path / "other")
    assert {n for n in whole if ".layers.2." not in n and ".layers.3." not in n} == short.keys()
    for name, tensor in short.items():
        assert torch.equal(tensor, whole[name]), name
        assert torch.equal(tensor, other[name]) == name.endswith(".dt_bias"), name
    first = "model.layers.0.mlp.shared_expert."
    assert not torch.equal(whole[f"{first}gate_proj.weight"], whole[f"{first}up_proj.weight"])


def test_values_are_plausible(tiny: Path) -> None:
    for name, tensor in load_weights(tiny).items():
        value = tensor.float()
        if name.endswith("A_log"):
            assert ((value.exp() > 0.009) & (value.exp() < 16.1)).all()
        elif name.endswith("dt_bias"):
            assert (value == 1).all()
        elif name.endswith("norm.weight"):
            centre = 1.0 if "linear_attn" in name else 0.0
            assert abs(value.mean() - centre) < 0.05 and value.std() < 0.1, name
        elif not name.endswith("conv1d.weight"):
            assert abs(value.mean()) < 0.01 and abs(value.std() - 0.02) < 0.004, name


def test_chunks_of_a_tensor_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1024)
    make_checkpoint(tmp_path / "c", MODEL, "tiny", layers=1)
    experts = load_weights(tmp_path / "c")["model.layers.0.mlp.experts.down_proj"]
    assert len({tuple(e.flatten()[:16].tolist()) for e in experts}) == len(experts)


def test_shards(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 1_000_000)
    make_checkpoint(tmp_path / "shards", MODEL, "tiny", seed=3)
    files = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert [p.name for p in tiny.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    whole, sharded = load_weights(tiny), load_weights(tmp_path / "shards")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    check_loads_and_runs(AutoModelForCausalLM, tmp_path / "shards")


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tied", MODEL, layers=1, overrides={"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_weights(tmp_path / "tied")
    check_loads_and_runs(AutoModelForCausalLM, tmp_path / "tied")


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """A tensor of 268 MB takes less memory to write than it has bytes: a chunk for each thread."""
    overrides = SMALL | {"hidden_size": 512, "num_experts": 256, "moe_intermediate_size": 512}
    script = (
        "import resource, sys, pathlib\n"
        "import et_moe.pipeline.make_checkpoint as module\n"
        "module.THREADS = 2\n"
        "from et_moe.examples.qwen3_5_moe.model import MODEL\n"
        "from et_moe.pipeline.make_checkpoint import make_checkpoint\n"
        "make_checkpoint(pathlib.Path(sys.argv[1]) / 'warm', MODEL, 'tiny', layers=1)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"make_checkpoint(pathlib.Path(sys.argv[1]) / 'big', MODEL, '35b', layers=1, "
        f"overrides={overrides})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert sum(p.stat().st_size for p in (tmp_path / "big").iterdir()) > 400_000_000
    assert int(result.stdout) * 1024 < 150_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "7b"}, "preset '7b': expected one of tiny, 35b"),
        ({"layers": 0}, "layers 0: expected 1 to 4"),
        ({"layers": 5}, "layers 5: expected 1 to 4"),
        ({"overrides": {"hiden_size": 1}}, "'hiden_size' is not a key"),
        ({"overrides": {"num_experts": 1}}, "num_experts_per_tok must not exceed num_experts"),
        ({"preset": "35b", "overrides": {"vocab_size": 320}}, "eos_token_id 248044 is not a token"),
        ({"overrides": {"vocab_size": 260}}, "vocab_size 260: expected at least 261"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_checkpoint(tmp_path / "x", MODEL, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        make_checkpoint(tmp_path / "full", MODEL)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    make_checkpoint(tmp_path / "empty", MODEL, layers=1)
    assert (tmp_path / "empty" / "config.json").exists()


def test_disk_full_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for the full disk: the kernel refuses the bytes beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(OSError) as caught:
            make_checkpoint(tmp_path / "x", MODEL)
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
