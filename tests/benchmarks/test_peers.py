"""The peers' parts that need no GPU: the models made for them, and the comparison."""

import json
import math
import subprocess
import sys

import pytest
import torch

from et_moe.backends.ops.attention import attention as ops_attention
from et_moe.benchmarks.peers import attention as peer_attention
from et_moe.benchmarks.peers import executorch as peer_executorch
from et_moe.benchmarks.peers import llama_cpp
from et_moe.benchmarks.peers.compare import executorch_rows
from et_moe.benchmarks.report import peers as report
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.models import parse_config

SHAPE = {
    "model_type": "qwen3_5_moe",
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "num_experts_per_tok": 2,
    "num_experts": 8,
}


def ours(prompt, prefill, decode, graph):
    rates = {"prefill_tok_s": {"median": prefill}, "decode_tok_s": decode and {"median": decode}}
    return {"activations": "int8", "cuda_graph": graph, "prompt": prompt, **rates}


def peer(phase, prompt, rate, variant="v", name="ExecuTorch"):
    return {"peer": name, "phase": phase, "variant": variant, "prompt": prompt, "tok_s": rate}


def test_compare_takes_the_fastest_of_each_side():
    e2e = {"rows": [ours(1600, 40000, 500, True), ours(1600, 30000, 550, False)]}
    e2e["rows"] += [ours(128, 9000, None, True), {"prompt": 1600, "error": "no"}]
    rows = [peer("prefill", 1600, 8000), peer("prefill", 1600, 10000, "w")]
    rows += [peer("decode", 1600, 110), peer("decode", 1600, 275, name="llama.cpp")]
    rows += [peer("decode", 128, 100), {"peer": "llama.cpp", "phase": "decode", "error": "no"}]
    rows[-1]["variant"] = "Q4_0"
    lines = report.compare(rows, e2e)
    found = {(x["phase"], x["prompt"], x["peer"]): x for x in lines}
    assert len(lines) == len(found) == 4
    prefill = found["prefill", 1600, "ExecuTorch"]
    assert prefill["ratio"] == pytest.approx(4.0) and prefill["peer_variant"] == "w"
    assert prefill["ours"] == "int8 activations, CUDA graphs"
    assert found["decode", 1600, "ExecuTorch"]["ratio"] == pytest.approx(5.0)
    assert found["decode", 1600, "llama.cpp"]["ratio"] == pytest.approx(2.0)
    assert found["decode", 128, "ExecuTorch"]["ratio"] is None
    head = {"machine": "G", "command": "x", "commit": None, "cpus": 2}
    text = "\n".join(report.section(head | {"rows": rows, "comparison": lines}))
    assert "| prefill | 1600 | ExecuTorch | w | 10000.0 | int8 activations, CUDA graphs |" in text
    assert "| decode | 128 | ExecuTorch | v | 100.0 | not measured | - | - |" in text
    assert "Failed: llama.cpp, decode, Q4_0, all prompts: no" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(tmp_path):
    (tmp_path / "e2e.json").write_text("{}")
    command = [sys.executable, "-m", "et_moe.benchmarks", "peers", "--e2e", tmp_path / "e2e.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "no CUDA GPU found" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_peer_whose_process_ends_is_reported():
    (row,) = executorch_rows(parse_config(SHAPE), [16], 4)
    assert row["peer"] == "ExecuTorch" and "exit code 1" in row["error"]


@pytest.fixture
def wheel_model():
    um, c = peer_executorch.load(), parse_config(SHAPE)
    return um, peer_executorch.build(um, c, 64, torch.device("cpu"), group=32), c


def test_the_wheels_model_is_quantized_as_its_export_does(wheel_model):
    _, model, c = wheel_model
    experts = model.layers[0].mlp.experts
    assert experts.w1.shape == (8, 128, 64) and experts.w1.dtype == torch.int8
    assert experts.w2_scale.shape == (8, 128, 2) and experts.group_size == 32
    assert not any(isinstance(m, torch.nn.Linear) and m.out_features > 8 for m in model.modules())
    attention = model.layers[3].attn
    assert attention.rotary_emb.inv_freq.dtype == torch.float32
    expected = c.rope_theta ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(attention.rotary_emb.inv_freq, expected)
    assert torch.equal(attention.cache_positions, torch.arange(64))
    assert not attention.kv_cache.k_cache.any() and not model.layers[0].attn.recurrent_state.any()
    floats = [p for p in model.parameters() if p.is_floating_point()]
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in floats)
    scale = model.lm_head.w_scale.float()
    assert scale.min() > 0.5 * 0.02 / 4.7 and scale.max() < 1.5 * 0.02 / 4.5


def test_the_wheels_model_runs_in_both_phases(wheel_model):
    """On the meta device: every op takes what it is given, and a token comes out."""
    um, model, c = wheel_model
    model, device = model.to("meta"), torch.device("meta")
    with torch.library._scoped_library("triton", "FRAGMENT") as library:
        # The op is flash-linear-attention's, which may be missing.
        if not hasattr(torch.ops.triton, "chunk_gated_delta_rule"):
            schema = "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor s)"
            library.define(f"chunk_gated_delta_rule{schema} -> (Tensor, Tensor)")
            library.impl(
                "chunk_gated_delta_rule",
                lambda q, k, v, g, beta, s: (torch.empty_like(v), torch.empty_like(s)),
                "Meta",
            )
        for phase, activations in peer_executorch.CALLS:
            peer_executorch.set_mode(um, model, phase, activations)
            token = peer_executorch.call(model, c, phase, 16, device)()
            assert token.shape == (1, 1)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_wheels_attention_does_what_ours_does(wheel_model, monkeypatch, tokens, compiled):
    """Its sdpa needs a GPU, so torch's stands in for it."""

    def sdpa(q, k, v, attn_mask, enable_gqa=True):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa
        )

    kernels = sys.modules["executorch.backends.cuda.triton.kernels.sdpa"]
    monkeypatch.setattr(kernels, "sdpa", sdpa)
    monkeypatch.setattr(kernels, "sdpa_decode_splitk", sdpa)
    monkeypatch.setattr(peer_attention, "COMPILER", {"backend": "aot_eager"})
    um, _, c = wheel_model
    module = peer_attention.ModuleAttention(um, c, 16, torch.device("cpu"), compiled)
    heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    qkv = torch.randn(tokens, 2 * (heads + kv) * dim).bfloat16()
    caches = [torch.randn(1, kv, 16, dim).bfloat16() for _ in range(2)]
    # Ours has one page, of which theirs is the beginning.
    expected_caches = [torch.nn.functional.pad(cache, (0, 0, 0, 64 - 16)) for cache in caches]
    first = 15 if tokens == 1 else 0
    out = module(qkv, torch.arange(first, first + tokens), *caches)
    layer = module.layer
    expected = ops_attention(
        qkv,
        layer.q_norm.weight,
        layer.k_norm.weight,
        layer.rotary_emb.inv_freq,
        *expected_caches,
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([first]),
    )
    torch.testing.assert_close(out[0], expected, atol=0.02, rtol=0.02)
    for cache, other in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, other[:, :, :16], atol=0.02, rtol=0.02)


def test_gguf_holds_the_tensors_of_the_shape(tmp_path):
    import gguf

    c, path = parse_config(SHAPE), tmp_path / "m.gguf"
    path.touch(mode=0o600)  # its permissions must stay
    llama_cpp.write_gguf(path, c)
    reader = gguf.GGUFReader(path)
    shapes = llama_cpp.tensor_shapes(c)
    assert [t.name for t in reader.tensors] == list(shapes)
    for tensor in reader.tensors:
        kind, shape = shapes[tensor.name]
        assert tensor.tensor_type.name == kind and tuple(tensor.shape[::-1]) == shape
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert math.isfinite(float(abs(values).max())), tensor.name
        if kind != "F32":
            assert 0.01 < float((values.astype("f8") ** 2).mean()) ** 0.5 < 0.03, tensor.name
    assert reader.get_field("qwen35moe.full_attention_interval").contents() == 4
    assert reader.get_field("qwen35moe.rope.dimension_sections").contents() == [3, 3, 2, 0]
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600


def test_gguf_of_the_published_shape_has_its_size():
    shapes = llama_cpp.tensor_shapes(parse_config({"model_type": "qwen3_5_moe"}))
    weights = sum(math.prod(shape) for _, shape in shapes.values())
    assert weights == pytest.approx(34.7e9, rel=0.01)
    assert shapes["blk.3.attn_q.weight"] == ("Q4_0", (8192, 2048))
    assert shapes["blk.0.ffn_gate_up_exps.weight"] == ("Q4_0", (256, 1024, 2048))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_intermediate_size": 48}, "needs rows of a multiple of 32, not 48"),
        ({"linear_value_head_dim": 64}, "linear_key_head_dim and linear_value_head_dim equal"),
        ({"layer_types": ["full_attention", *["linear_attention"] * 3]}, "at intervals"),
    ],
)
def test_shapes_that_llama_cpp_does_not_take(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        llama_cpp.write_gguf(tmp_path / "m.gguf", parse_config(SHAPE | change))
    assert not list(tmp_path.iterdir())


LLAMA_BENCH = """#!/bin/sh
case "$*" in *"-d "*) [ -e "$(dirname "$0")/fails" ] && { echo "out of memory" >&2; exit 1; };; esac
cat "$(dirname "$0")/answer.json"
"""


def test_rows_of_llama_bench(tmp_path):
    """A stand-in for llama-bench answers in its format."""
    made = {"backends": "CUDA", "n_ubatch": 512, "n_prompt": 1600, "n_depth": 0}
    (tmp_path / "answer.json").write_text(json.dumps([made | {"samples_ts": [1.0, 9.0, 2.0]}]))
    (tmp_path / "fails").touch()
    binary = tmp_path / "llama-bench"
    binary.write_text(LLAMA_BENCH)
    binary.chmod(0o755)
    prefill, decode = llama_cpp.run_bench(binary, tmp_path / "m.gguf", [1600], 512)
    assert prefill["prompt"] == 1600 and prefill["tok_s"] == 2.0
    assert prefill["variant"] == "Q4_0, CUDA, micro-batch 512"
    assert decode["phase"] == "decode" and decode["error"] == "out of memory"
