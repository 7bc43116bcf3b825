"""The reference model: its training pass, the simulation of quantized weights, and the command."""

import json
import lzma
import math

import numpy
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM

from et_moe.backends.method_graph import PAGES, SLOTS
from et_moe.backends.ops import PAGE_SIZE
from et_moe.benchmarks.reference.forward import Forward
from et_moe.benchmarks.reference.measure import Sizes, measure, taken
from et_moe.benchmarks.reference.recipes import Row, recipe, rows, single_parts
from et_moe.benchmarks.reference.simulated import Simulation
from et_moe.benchmarks.reference.training import Batch, Text, model_config, schedule
from et_moe.benchmarks.report import quality
from et_moe.examples.qwen3_5_moe.graph import Places
from et_moe.examples.qwen3_5_moe.tokenizer import tokenizer_json
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.quantize import QuantizedCheckpoint, meta_graph
from et_moe.pipeline.storage import Int4, Precision

SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_num_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_str(json.dumps(tokenizer_json()))


@pytest.fixture
def model(tokenizer):
    """A small model whose norms and weights are off their neutral values."""
    config = model_config(tokenizer)
    for name, value in SMALL.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = Qwen3_5MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter *= 3
            parameter.copy_(parameter.bfloat16())
    return model


def test_training_pass_computes_what_hugging_face_does(model):
    tokens = torch.randint(0, model.config.vocab_size, (3, 129))
    loss, balance = Forward(model, compiled=False)(tokens)
    out = model(tokens[:, :-1], use_cache=False, output_router_logits=True)
    expected = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert 0.9 < balance < 4
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name


def graph_logits(source, activations, tokens):
    """Logits of the ops' eager references behind each of the tokens of one sequence, in fp32."""
    graph = meta_graph(source.config, Precision(source.storages, activations, torch.float32))
    dtypes = {name: p.dtype for name, p in graph.named_parameters()}
    tensors = {n: t.to(dtypes[n]) for group in source.groups() for n, t in group.items()}
    graph.load_state_dict(tensors, assign=True)
    pages = torch.arange(-(-len(tokens) // PAGE_SIZE), dtype=torch.int32)[None]
    zero = torch.zeros(1, dtype=torch.int64)
    places = Places(zero, zero.int(), pages, None)
    state = graph.make_state({PAGES: pages.numel(), SLOTS: 1})
    return graph.lm_head(graph.hidden(tokens[None], places, state), norm=graph.norm.weight)


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["4w", "mixed", "dense"])
def test_simulation_is_what_the_graph_of_the_ops_computes(model, tmp_path, name, activations):
    model.save_pretrained(tmp_path)
    storages = recipe(name, 64)
    tokens = torch.randint(0, model.config.vocab_size, (40,))
    source = QuantizedCheckpoint(Checkpoint(tmp_path), storages)
    expected = graph_logits(source, activations, tokens)
    simulation = Simulation(model)
    simulation.quantize(Row("", "", storages).storage_of, activations == "int8")
    with torch.no_grad():
        actual = model(tokens[None], use_cache=False).logits[0]
    # An activation on the edge between two integers may fall to either side.
    error = (actual - expected).norm() / expected.norm()
    assert error < (2e-3 if activations == "int8" else 1e-5)


def test_moments_are_those_of_the_inputs(model):
    simulation = Simulation(model)
    seen = {}

    def record(name):
        def hook(module, inputs):
            seen.setdefault(name, []).append(inputs[0].flatten(0, -2))

        return hook

    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(record("o"))
    windows = torch.randint(0, model.config.vocab_size, (20, 64))
    moments = simulation.moments(windows)
    expected = torch.cat(seen["o"]).square().mean(0)
    torch.testing.assert_close(moments["layers.1.self_attn.o_proj.weight"].mean(), expected)
    experts = moments["layers.0.mlp.experts.down_proj"]
    assert experts.squares.shape == (8, 128)
    assert experts.rows.sum() == windows.numel() * model.config.num_experts_per_tok
    assert set(moments) == set(simulation.weights) - {"embed_tokens.weight"}


def test_importance_lowers_the_weighed_error_of_outputs(model):
    simulation = Simulation(model)
    windows = torch.randint(0, model.config.vocab_size, (8, 64))
    importance = {name: sums.mean() for name, sums in simulation.moments(windows).items()}
    name = "layers.0.mlp.experts.down_proj"
    weight, errors = simulation.weights[name].float(), {}
    for label, given in (("without", None), ("with", importance)):
        simulation.quantize(Row("", "", recipe("4w")).storage_of, False, "search", given)
        left = model.model.layers[0].mlp.experts.down_proj - weight
        errors[label] = (left.square() * importance[name][:, None]).sum()
    assert errors["with"] < errors["without"]


def test_footprint_with_exceptions_is_that_of_such_parts(model):
    simulation = Simulation(model)
    parts = recipe("mixed")
    exception = Row("", "", parts, exceptions={"lm_head": Int4(32)})
    taken_so = taken(model.config, exception, simulation)
    assert taken_so == taken(model.config, Row("", "", {**parts, "head": Int4(32)}), simulation)
    experts = Row("", "", parts, exceptions={".experts.": Int4(32)})
    other = {**parts, "experts": Int4(32)}
    assert taken(model.config, experts, simulation) == taken(
        model.config, Row("", "", other), simulation
    )


def test_rows_store_every_weight_and_except_some(model):
    """No exception is a typing error, and each storage takes the weights that it is for."""
    weights = Simulation(model).weights
    for row in (*rows(), *single_parts()):
        for name, weight in weights.items():
            assert row.storage_of(name).tensors(name, weight.shape, torch.bfloat16)
        for inside in row.exceptions:
            assert any(inside in name for name in weights), inside


def test_rows_have_names_of_their_own():
    for table in (rows(), single_parts()):
        keys = [(row.name, row.scales, row.activations) for row in table]
        assert len(keys) == len(set(keys)) > 10


def test_learning_rate_warms_up_and_falls():
    rates = [schedule(share / 100) for share in range(101)]
    assert rates[0] < 0.1 and max(rates) == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0.03)


@pytest.fixture
def text(tmp_path, tokenizer):
    """A folder as scripts/reference_text.py writes it, of text that repeats itself."""
    folder = tmp_path / "text"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    line = numpy.frombuffer(b"The reference model learns to go on with this line. ", "u1")
    for part in ("train", "calibrate", "heldout"):
        tokens = numpy.tile(line, 40).astype("<u2")
        (folder / f"{part}.bin.xz").write_bytes(lzma.compress(tokens.tobytes()))
    counts = {"tokens": 40 * len(line), "bytes": 40 * len(line)}
    package = {"package": "python3.11-doc", "version": "3.11.2", "licence": "PSF-2"}
    parts = dict.fromkeys(("train", "heldout"), counts)
    (folder / "sources.json").write_text(json.dumps({"parts": parts, "packages": [package]}))
    return folder


def test_command_trains_and_measures_in_its_time(text, tmp_path, monkeypatch, tokenizer):
    config = model_config(tokenizer)
    for name, value in SMALL.items():
        setattr(config, name, value)
    todo = [Row("mixed", "mse", recipe("mixed")), Row("4w", "search, importance", recipe("4w"))]
    monkeypatch.setattr("et_moe.benchmarks.reference.measure.rows", lambda: iter(todo))
    monkeypatch.setattr("et_moe.benchmarks.reference.measure.single_parts", lambda: iter(todo[:1]))
    out = tmp_path / "quality.json"
    sizes = Sizes(Batch(4, 64), windows=8, calibration=4)
    measure(Text(text), out, 0.5, 0, sizes, config)
    result = json.loads(out.read_text())
    assert result["training"][-1]["loss"] < result["training"][0]["loss"] - 0.5
    assert result["positions"] == 8 * 63
    assert [row["recipe"] for row in result["rows"]] == ["mixed", "4w"]
    assert len(result["parts"]) == 1
    mixed, all_int4 = result["rows"]
    assert 0 < mixed["kl"] < all_int4["kl"]
    assert mixed["bits"] > all_int4["bits"] and mixed["top1"] > 0.5
    assert math.isfinite(result["bits_per_byte"])
    condensed = quality.condense(result)
    assert condensed["training"][-1] == result["training"][-1]
    page = "\n".join(quality.section(condensed))
    assert "| mixed | mse | bf16 | " in page and "text: python3.11-doc 3.11.2 (PSF-2)." in page


@pytest.mark.parametrize(
    ("bits", "kl", "top1", "text"),
    [
        (4.5, 0.009, 0.97, "which reaches it"),
        (4.5, 0.011, 0.97, "which does not reach it"),
        (4.5, 0.009, 0.95, "which does not reach it"),
        (4.7, 0.001, 0.99, "No row takes so few bits"),
    ],
)
def test_page_says_whether_the_goal_is_reached(bits, kl, top1, text):
    row = {"recipe": "r", "scales": "mse", "activations": "int8", "bits": bits, "kl": kl}
    row |= {"kl_error": 0.001, "top1": top1, "perplexity": 9.0, "bytes_per_token": 10**6}
    result = {"command": "x", "machine": "G", "cpus": 2, "parameters": 10, "rows": [row]}
    result |= {"config": {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}}
    result |= {"training": [{"seconds": 2.0, "tokens": 100, "loss": 3.0}], "positions": 50}
    result |= {"perplexity": 20.0, "bits_per_byte": 1.5, "calibration_tokens": 40}
    result |= {"expert_shares": [0.1, 0.2]}
    result |= {"text": {"packages": [], "parts": {"train": {"tokens": 100}}}}
    assert text in "\n".join(quality.section(result))


def test_text_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file, expected a folder of"):
        Text(tmp_path)
