"""The runner gives the tokens of Hugging Face's model, in float32 and without quantization."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.models import MTP, load_config, model_of
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import choose_storages

PROMPT_LENGTHS = (1, 2, 7, 63, 64, 65, 300)
NEW_TOKENS = 64
LINEAR, FULL = "linear_attention", "full_attention"

BASE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "layer_types": [LINEAR, FULL],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
CONFIGS = {
    "one_kv_head": {"num_key_value_heads": 1},
    "three_value_heads_per_key_head": {"linear_num_value_heads": 6},
    "top_1": {"num_experts_per_tok": 1, "layer_types": [LINEAR, LINEAR, FULL]},
    "top_8_last_layer_linear": {
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "layer_types": [FULL, LINEAR],
    },
    "tied_embeddings": {"tie_word_embeddings": True, "layer_types": [LINEAR, FULL, LINEAR]},
    "conv_2": {"linear_conv_kernel_dim": 2},
    "wide_shared_expert": {
        "shared_expert_intermediate_size": 80,
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 1.0,
        },
    },
}
CONFIGS["yarn"] = {
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
NEXT_CONFIGS = {
    "next": {},
    "next_three_value_heads_per_key_head": {"linear_num_value_heads": 6},
    "next_not_normalized": {"norm_topk_prob": False},
    "next_dense_layers": {
        "intermediate_size": 96,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "layer_types": [LINEAR, FULL, LINEAR, LINEAR],
    },
}
MODELS = {
    **{n: (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM, c) for n, c in CONFIGS.items()},
    **{n: (Qwen3NextConfig, Qwen3NextForCausalLM, c) for n, c in NEXT_CONFIGS.items()},
}
WITH_DRAFTS = ("next_dense_layers",)


def add_random_head(directory: Path) -> None:
    """The tensors of a head for multi-token prediction, which Hugging Face's models do not read. As
    in published checkpoints of Qwen3-Next, no key of config.json speaks of it."""
    config = load_config(directory)
    assert config.mtp_num_hidden_layers == 1
    shapes = model_of(config).tensors.shapes(config, ())
    file = directory / "model.safetensors"
    head = {n: torch.randn(shape) * 0.1 for n, shape in shapes.items() if n.startswith(MTP)}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A random Hugging Face model and its export without quantization."""
    make_config, make_model, changes = MODELS[request.param]
    layers = len(changes.get("layer_types", BASE["layer_types"]))
    config = make_config(**{**BASE, **changes}, num_hidden_layers=layers, pad_token_id=0)
    torch.manual_seed(len(request.param))
    model = make_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() >= 2:
                parameter.mul_(2.5)  # wider logits and decisive routing than at initialisation
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "checkpoint")
    drafts = 2 if request.param in WITH_DRAFTS else 0
    if drafts:
        add_random_head(folder / "checkpoint")
    checkpoint = Checkpoint(folder / "checkpoint")
    unquantized = choose_storages(model_of(checkpoint.config).parts, "none", 128, "none")
    source = QuantizedCheckpoint(checkpoint, unquantized)
    export(source, folder / "program", ExportOptions(dtype=torch.float32, draft_tokens=drafts))
    return model, folder / "program"


def random_prompt(model, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, model.config.vocab_size, (1, length), generator=generator)


def greedy_tokens(model, prompt: torch.Tensor) -> list[int]:
    """What Hugging Face's model generates after a prompt."""
    with torch.no_grad():
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return generated[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_greedy_tokens_equal_hugging_face(case, runner, length: int) -> None:
    model, program = case
    prompt = random_prompt(model, length)
    expected = greedy_tokens(model, prompt)
    assert runner.generate(program, prompt[0].tolist(), NEW_TOKENS) == expected


def test_greedy_tokens_of_a_prompt_in_parts(case, runner, run_engine) -> None:
    """Pieces of a prompt begin where it was cut: in a chunk, at its end, after a single token."""
    model, program = case
    prompt = random_prompt(model, 90)[0].tolist()
    whole = runner.generate(program, prompt, NEW_TOKENS)
    for cut in (1, 30, 64, 89):
        _, rest = run_engine(
            program,
            {"append": prompt[:cut], "max_new_tokens": 0},
            {"append": prompt[cut:], "max_new_tokens": NEW_TOKENS},
        )
        assert rest["ids"] == whole


def test_log_probabilities_within_1e_3(case, runner) -> None:
    model, program = case
    ids = random_prompt(model, 130)
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    scored = torch.tensor(runner.score(program, ids[0].tolist()))
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-3)


def test_prefill_and_token_by_token_reach_the_same_state(case, runner, tmp_path: Path) -> None:
    """The continuation depends on every state tensor: equal logits mean equal state."""
    model, program = case
    ids = random_prompt(model, 90)[0].tolist()
    continued = runner.generate(program, ids, 40)
    # Scoring feeds token by token; its log-probabilities of the greedy tokens are the largest.
    scored = runner.score(program, ids + continued)[len(ids) - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([ids + continued])).logits[0, len(ids) - 1 : -1]
    best = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(scored), best, rtol=0, atol=1e-3)
