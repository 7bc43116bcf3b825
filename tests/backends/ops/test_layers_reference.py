"""The eager references against the layers of Hugging Face's model, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from sequences import make_pages, read_cache
from torch import Tensor
from transformers import DynamicCache, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeAttention,
    Qwen3_5MoeGatedDeltaNet,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeSparseMoeBlock,
    Qwen3_5MoeTextRotaryEmbedding,
)
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

from et_moe.backends import ops

HIDDEN = 48
EPS = 1e-5
# Calls of growing sequences: a prompt, a second piece of it, and single tokens.
CALLS = ((1, 1, 1), (5, 1, 1), (64, 1, 7, 1), (100, 30, 1, 1))


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make_config(**values) -> Qwen3_5MoeTextConfig:
    config = Qwen3_5MoeTextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, rms_norm_eps=EPS, vocab_size=64, **values
    )
    config._attn_implementation = "eager"
    return config


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        elif name == "dt_bias":
            parameter.copy_(torch.randn_like(parameter))
    return module.eval()


def pieces(calls: tuple[int, ...]) -> list[Tensor]:
    return list(torch.randn(sum(calls), HIDDEN).split(calls))


def heads(keys: int, values: int, kernel: int = 4) -> dict[str, int]:
    return {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_conv_kernel_dim": kernel,
    }


DELTA_NETS = {
    "one key head": heads(1, 4),
    "3 value heads per key head": heads(2, 6),
    "kernel 2": heads(2, 2, kernel=2),
    "kernel 5": heads(2, 4, kernel=5),
}


@pytest.mark.parametrize("calls", CALLS, ids=str)
@pytest.mark.parametrize("values", DELTA_NETS.values(), ids=DELTA_NETS)
@pytest.mark.parametrize("padding", [0, 3])
def test_gated_delta_net(values: dict, calls: tuple[int, ...], padding: int) -> None:
    """Outputs and states, piece by piece; padding rows change neither."""
    config = make_config(
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        layer_types=["linear_attention"],
        **values,
    )
    layer = randomize(Qwen3_5MoeGatedDeltaNet(config, 0))
    projection = torch.cat([getattr(layer, f"in_proj_{p}").weight for p in ("qkv", "z", "b", "a")])
    taps = config.linear_conv_kernel_dim
    slots, slot = torch.tensor([2], dtype=torch.int32), 2
    conv_state = torch.zeros(3, taps - 1, layer.conv_dim)
    state = torch.zeros(3, layer.num_v_heads, 16, 24)
    cache = DynamicCache(config=config)
    for x in pieces(calls):
        expected = layer(x[None], cache_params=cache)[0]
        padded = F.pad(x, (0, 0, 0, padding), value=3.0)
        core = ops.gated_delta_net(
            padded @ projection.T,
            layer.conv1d.weight[:, 0],
            layer.A_log,
            layer.dt_bias,
            layer.norm.weight,
            conv_state,
            state,
            slots,
            EPS,
            torch.tensor([len(x)]) if padding else None,
        )
        close(core[: len(x)] @ layer.out_proj.weight.T, expected)
        close(state[slot], cache.layers[0].recurrent_states[0][0])
        close(conv_state[slot].T, cache.layers[0].conv_states[0][0][:, -(taps - 1) :])
        assert (state[:slot] == 0).all() and (conv_state[:slot] == 0).all()


ATTENTIONS = {
    "one kv head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "a kv head per head": {"num_attention_heads": 2, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("calls", CALLS, ids=str)
@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("values", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("padding", [0, 3])
def test_attention(values: dict, rotary: float, calls: tuple[int, ...], padding: int) -> None:
    """Outputs and caches, piece by piece; padding rows are not written to the cache."""
    dim, capacity = 32, 150
    config = make_config(
        head_dim=dim,
        layer_types=["full_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": rotary,
        },
        **values,
    )
    layer = randomize(Qwen3_5MoeAttention(config, 0))
    rope = Qwen3_5MoeTextRotaryEmbedding(config)
    projection = torch.cat([getattr(layer, f"{p}_proj").weight for p in "qkv"])
    pages, total = make_pages([capacity])
    # What lies beyond the tokens must not matter.
    k_cache = torch.full((total, config.num_key_value_heads, ops.PAGE_SIZE, dim), 9.0)
    v_cache = k_cache.clone()
    cache, position = DynamicCache(config=config), 0
    for x in pieces(calls):
        positions = torch.arange(position, position + len(x))
        future = torch.arange(position + len(x)) > positions[:, None]
        mask = torch.zeros(future.shape).masked_fill(future, float("-inf"))[None, None]
        embeddings = rope(x[None], positions.expand(3, 1, -1))
        expected = layer(x[None], embeddings, mask, past_key_values=cache)[0][0]
        core = ops.attention(
            F.pad(x, (0, 0, 0, padding), value=3.0) @ projection.T,
            layer.q_norm.weight,
            layer.k_norm.weight,
            rope.inv_freq,
            k_cache,
            v_cache,
            pages,
            torch.tensor([position]),
            EPS,
            torch.tensor([len(x)]) if padding else None,
        )
        position += len(x)
        close(core[: len(x)] @ layer.o_proj.weight.T, expected)
        for ours, theirs in ((k_cache, cache.layers[0].keys), (v_cache, cache.layers[0].values)):
            close(read_cache(ours, pages[0], position), theirs[0])
            assert (ours == 9.0).all(-1).all(1).sum() == total * ops.PAGE_SIZE - position


def test_attention_refuses_what_does_not_fit_the_pages() -> None:
    cache = torch.zeros(1, 1, ops.PAGE_SIZE, 4)
    weights = (torch.zeros(4), torch.zeros(4), torch.ones(1))
    pages = torch.zeros(1, 1, dtype=torch.int32)
    arguments = [torch.zeros(3, 16), *weights, cache, cache.clone(), pages]
    for position in (-1, 62, 64):
        message = rf"tokens {position}\.\.{position + 2} of sequence 0 do not fit 1 pages"
        with pytest.raises(ValueError, match=message):
            ops.attention(*arguments, torch.tensor([position]))
    ops.attention(*arguments, torch.tensor([61]))
    ops.attention(*arguments, torch.tensor([62]), num_tokens=torch.tensor([2]))


def expert_tables(block: Qwen3_5MoeSparseMoeBlock) -> tuple[Tensor, Tensor, int]:
    """w13 and w2 with the shared expert in further slots, and how many slots these are."""
    width, shared = block.experts.intermediate_dim, block.shared_expert.intermediate_size
    slots = -(-shared // width)
    pad = slots * width - shared
    gate, up = (
        F.pad(p.weight, (0, 0, 0, pad)).view(slots, width, HIDDEN)
        for p in (block.shared_expert.gate_proj, block.shared_expert.up_proj)
    )
    down = F.pad(block.shared_expert.down_proj.weight, (0, pad)).view(HIDDEN, slots, width)
    return (
        torch.cat((block.experts.gate_up_proj, torch.cat((gate, up), dim=1))),
        torch.cat((block.experts.down_proj, down.transpose(0, 1))),
        slots,
    )


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (16, 8), (5, 5)])
@pytest.mark.parametrize("shared", [32, 20, 80])
def test_sparse_moe(tokens: int, experts: int, top_k: int, shared: int) -> None:
    """Norm, router, experts and shared expert, with padding rows and the residual."""
    config = make_config(
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=shared,
    )
    block = randomize(Qwen3_5MoeSparseMoeBlock(config))
    norm = Qwen3_5MoeRMSNorm(HIDDEN, eps=EPS)
    norm.weight.normal_(0, 0.3)
    x = torch.randn(tokens, HIDDEN)
    expected = x + block(norm(x)[None])[0]
    w13, w2, slots = expert_tables(block)
    padded = F.pad(x, (0, 0, 0, 2), value=7.0)
    normed, weights, ids = ops.moe_router(
        padded,
        norm.weight,
        torch.cat((block.gate.weight, block.shared_expert_gate.weight)),
        top_k,
        slots,
        EPS,
        torch.tensor([tokens]),
    )
    close(normed[:tokens], norm(x))
    assert weights.shape == ids.shape == (tokens + 2, top_k + slots)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    _, expected_weights, expected_ids = block.gate(norm(x))
    assert torch.equal(ids[:tokens, :top_k].long(), expected_ids)
    close(weights[:tokens, :top_k], expected_weights)
    close(weights[:tokens, :top_k].sum(-1), torch.ones(tokens))
    assert (ids[:tokens, top_k:] == torch.arange(experts, experts + slots)).all()
    assert (ids[tokens:] == -1).all() and (weights[tokens:] == 0).all()
    result = ops.moe(normed, w13, w2, weights, ids, padded)
    close(result[:tokens], expected)
    assert torch.equal(result[tokens:], padded[tokens:])
    close(ops.moe(normed, w13, w2, weights, ids)[:tokens], expected - x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 1), (16, 16), (512, 10)])
def test_router_of_qwen3_next(experts: int, top_k: int, normalize: bool) -> None:
    """With and without `norm_topk_prob`; Qwen3-Next-80B has 512 experts, of which 10 are chosen."""
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalize,
    )
    router, gate = randomize(Qwen3NextTopKRouter(config)), torch.randn(1, HIDDEN)
    x = torch.randn(33, HIDDEN) * 3
    normed, weights, ids = ops.moe_router(
        x,
        torch.zeros(HIDDEN),
        torch.cat((router.weight, gate)),
        top_k,
        1,
        EPS,
        normalize=normalize,
    )
    _, expected_weights, expected_ids = router(normed)
    assert torch.equal(ids[:, :top_k].long(), expected_ids) and (ids[:, top_k] == experts).all()
    close(weights[:, :top_k], expected_weights)
    assert normalize or top_k == experts or (weights[:, :top_k].sum(-1) < 0.999).all()
    close(weights[:, top_k:], (normed @ gate.T).sigmoid())


def test_router_prefers_the_lower_id_among_equals() -> None:
    weight = torch.zeros(7, HIDDEN)
    _, weights, ids = ops.moe_router(torch.randn(3, HIDDEN), torch.zeros(HIDDEN), weight, 3, 1)
    assert ids.tolist() == [[0, 1, 2, 6]] * 3
    close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.5]] * 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = Qwen3_5MoeRMSNorm(HIDDEN, eps=EPS).to(dtype)
    norm.weight.normal_(0, 0.3)
    x = torch.randn(5, HIDDEN, dtype=dtype)
    assert torch.equal(ops.rms_norm(x, norm.weight, EPS), norm(x))


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_linear(with_norm: bool, with_residual: bool) -> None:
    layer, norm = torch.nn.Linear(HIDDEN, 20, bias=False), Qwen3_5MoeRMSNorm(HIDDEN, eps=EPS)
    norm.weight.normal_(0, 0.3)
    x, residual = torch.randn(9, HIDDEN), torch.randn(9, 20)
    expected = layer(norm(x) if with_norm else x) + (residual if with_residual else 0)
    weight = norm.weight if with_norm else None
    close(ops.linear(x, layer.weight, weight, EPS, residual if with_residual else None), expected)


@pytest.mark.parametrize("columns", [128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_layers_are_those_of_the_dequantized_weights(columns: int, dtype: torch.dtype) -> None:
    """Exactly so with float activations; INT8 activations cost at most 2%."""
    weight, scale = ops.quantize_w8(torch.randn(256, columns) * torch.rand(256, 1))
    wide = ops.dequantize_w8(weight, scale)
    x = torch.randn(40, columns, dtype=dtype)
    norm, residual = torch.randn(columns, dtype=dtype), torch.randn(40, 256, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    expected = ops.linear(x, wide, norm, EPS, residual)
    actual = ops.linear_w8a16(x, weight, scale, norm, EPS, residual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    w8a8 = ops.linear_w8a8(x, weight, scale, norm, EPS, residual)
    assert actual.dtype == w8a8.dtype == dtype
    error = (w8a8.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_experts_are_those_of_the_dequantized_weights(dtype: torch.dtype) -> None:
    """Exactly so with float activations but for their rounding; INT8 activations cost at most
    2%."""
    w13 = ops.quantize_w8(torch.randn(6, 150, 100) * torch.rand(6, 150, 1))
    w2 = ops.quantize_w8(torch.randn(6, 100, 75))
    assert w13[0].shape == (6, 150, 100) and w13[1].shape == (6, 150, 1)
    wide13, wide2 = (ops.dequantize_w8(*w) for w in (w13, w2))
    x, ids, weights = (
        torch.randn(40, 100, dtype=dtype),
        torch.randint(-1, 7, (40, 3)),
        torch.rand(40, 3),
    )
    expected = ops.moe(x, wide13, wide2, weights, ids, x).float()
    for op, tolerance in (
        (ops.moe_w8a16, 1e-6 if dtype == torch.float32 else 5e-3),
        (ops.moe_w8a8, 0.02),
    ):
        actual = op(x, *w13, *w2, weights, ids, x)
        assert actual.dtype == dtype
        assert (actual.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("group_size", ops.GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_layers_are_those_of_the_dequantized_weights(
    group_size: int, dtype: torch.dtype
) -> None:
    """Exactly so with float activations; INT8 activations cost at most 2%."""
    w13 = ops.quantize_w4(torch.randn(6, 256, 128), group_size)
    w2 = ops.quantize_w4(torch.randn(6, 128, 128), group_size)
    wide13, wide2 = (ops.dequantize_w4(*w, group_size) for w in (w13, w2))
    x = torch.randn(40, 128, dtype=dtype)
    norm, residual = torch.randn(128, dtype=dtype), torch.randn(40, 256, dtype=dtype)
    one = w13[0][0], w13[1][0]
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2

    def error(actual: Tensor, expected: Tensor) -> float:
        return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()

    expected = ops.linear(x, wide13[0], norm, EPS, residual)
    actual = ops.linear_w4a16(x, *one, group_size, norm, EPS, residual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert actual.dtype == dtype
    assert error(ops.linear_w4a8(x, *one, group_size, norm, EPS, residual), expected) < 0.02

    ids = torch.randint(-1, 6, (40, 3))
    weights = torch.rand(40, 3)
    expected = ops.moe(x, wide13, wide2, weights, ids)
    actual = ops.moe_w4a16(x, *w13, *w2, weights, ids, group_size)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 500)
    assert error(actual, expected) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert error(ops.moe_w4a8(x, *w13, *w2, weights, ids, group_size), expected) < 0.02
