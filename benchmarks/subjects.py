"""Our kernels and the ExecuTorch wheel's, side by side, at the true model's shapes."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.gated_delta_net.op import gated_delta_net, gated_delta_rule
from et_moe.backends.cuda.triton.linear import op as linear
from et_moe.backends.cuda.triton.linear.layout import prepack_linear
from et_moe.backends.cuda.triton.moe import op as moe
from et_moe.backends.cuda.triton.moe.layout import prepack_experts
from et_moe.backends.cuda.triton.router.op import moe_router
from et_moe.backends.cuda.triton.sampling.op import sample
from et_moe.backends.ops import PAGE_SIZE
from et_moe.benchmarks import roofline
from et_moe.benchmarks.peers import attention as peer_attention
from et_moe.pipeline.models import parse_config

GROUP = 128
CONFIG = parse_config({"model_type": "qwen3_5_moe"})
WHEEL = "executorch.backends.cuda.triton.kernels"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation, called as `call(**arguments(m))` for m tokens.

    Attributes:
        takes: whether it is measured for m tokens.
        peer: whether it is the wheel's.
        part: whether it does only a part of the subject's work.
    """

    name: str
    call: Callable
    arguments: Callable[[int], dict]
    takes: Callable[[int], bool] = lambda m: True
    peer: bool = False
    part: bool = False


@dataclasses.dataclass(frozen=True)
class Subject:
    """A piece of work that contenders do.

    Attributes:
        cost: its kernels for m tokens, as in `roofline`.
    """

    name: str
    cost: Callable[[int], list[roofline.Kernel]]
    contenders: list[Contender]


def random_w4(*shape: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A random INT4 weight of a bundle: packed `[..., N, K/2]`, scale `[..., N, K/GROUP]`."""
    *rows, k = shape
    packed = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8, device=device)
    return packed, (torch.rand(*rows, k // GROUP, device=device) * 0.01 + 0.001).bfloat16()


def bf16(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def experts(device: torch.device, wheel: ModuleType | None) -> Subject:
    """The routed experts; the shared one is left out, since the wheel's kernels have none."""
    c = dataclasses.replace(CONFIG, shared_expert_intermediate_size=0)
    count, hidden, inner, top_k = c.num_experts, c.hidden_size, c.moe_intermediate_size, 8
    w13, w13_scale = random_w4(count, 2 * inner, hidden, device=device)
    w2, w2_scale = random_w4(count, hidden, inner, device=device)
    names = ("w13", "w13_scale", "w2", "w2_scale")
    packed = prepack_experts(w13, w13_scale, w2, w2_scale, GROUP)
    prepacked = dict(zip(names, packed, strict=True))

    def routing(m: int) -> dict:
        weights, ids = torch.randn(m, count, device=device).topk(top_k)
        return {"topk_weights": weights.softmax(-1), "topk_ids": ids.int()}

    def ours(m: int) -> dict:
        return {"x": bf16(m, hidden, device=device), **prepacked, **routing(m), "group_size": GROUP}

    def theirs(m: int) -> dict:
        chosen = routing(m)
        return {
            "hidden_states": bf16(m, hidden, device=device),
            "w1": w13.view(torch.int8),
            "w1_scale": w13_scale,
            "w2": w2.view(torch.int8),
            "w2_scale": w2_scale,
            "topk_weights": chosen["topk_weights"],
            "topk_ids": chosen["topk_ids"].long(),
            "top_k": top_k,
            "num_experts": count,
            "group_size": GROUP,
        }

    contenders = [
        Contender("moe_w4a8", moe.moe_w4a8, ours),
        Contender("moe_w4a16", moe.moe_w4a16, ours),
    ]
    if wheel:
        contenders += [
            Contender("fused_moe", wheel.fused_moe, theirs, lambda m: m <= 16, peer=True),
            *(
                Contender(name, getattr(wheel, name), theirs, lambda m: m > 1, peer=True)
                for name in ("fused_moe_batched_gemm", "fused_moe_batched_gemm_int8")
            ),
        ]
    return Subject("experts", lambda m: roofline.experts(m, c), contenders)


def dense(name: str, n: int, k: int, device: torch.device, wheel: ModuleType | None) -> Subject:
    """A linear layer without norm and residual, which the wheel's kernels do not fuse."""
    weight, scale = random_w4(n, k, device=device)
    packed, packed_scale = prepack_linear(weight, scale, GROUP)

    def ours(m: int) -> dict:
        # Copies, as inputs are rotated: a layer's weights are never in the cache.
        weights = {"weight": packed.clone(), "scale": packed_scale.clone()}
        return {"x": bf16(m, k, device=device), **weights, "group_size": GROUP}

    def theirs(m: int) -> dict:
        weights = {"w_packed": weight.view(torch.int8).clone(), "w_scale": scale.clone()}
        return {"x": bf16(m, k, device=device), **weights, "group_size": GROUP}

    def dequantized(x, w_packed, w_scale, group_size):
        return x @ wheel.dequant_w4_to_bf16(w_packed, w_scale, group_size).T

    contenders = [
        Contender("linear_w4a8", linear.linear_w4a8, ours),
        Contender("linear_w4a16", linear.linear_w4a16, ours),
    ]
    if wheel:
        contenders += [
            Contender("int4_matvec", wheel.int4_matvec, theirs, lambda m: m == 1, peer=True),
            Contender("dequant_w4_to_bf16, mm", dequantized, theirs, lambda m: m > 1, peer=True),
        ]
    return Subject(name, lambda m: roofline.linear(name, m, k, n, False), contenders)


def delta_rule(device: torch.device, wheel: ModuleType | None) -> Subject:
    """The gated delta rule alone; its state is fp32 here, and bf16 in the wheel's."""
    c = CONFIG
    heads, key_heads, dim = c.linear_num_value_heads, c.linear_num_key_heads, 128

    def ours(m: int) -> dict:
        return {
            "q": bf16(m, key_heads, dim, device=device),
            "k": bf16(m, key_heads, dim, device=device),
            "v": bf16(m, heads, dim, device=device),
            "g": -torch.rand(m, heads, device=device),
            "beta": torch.rand(m, heads, device=device),
            "state": torch.zeros(1, heads, dim, dim, device=device),
            "slots": torch.zeros(1, dtype=torch.int32, device=device),
        }

    def theirs(m: int) -> dict:
        made = ours(m)
        del made["slots"]
        made["initial_state"] = made.pop("state").bfloat16()
        made |= {k: made[k][None] for k in ("q", "k", "v", "g", "beta")}
        for name in ("q", "k"):
            wide = made[name].repeat_interleave(heads // key_heads, dim=2)
            made[name] = torch.nn.functional.normalize(wide.float(), dim=-1).bfloat16()
        made["g"], made["beta"] = made["g"].bfloat16(), made["beta"].bfloat16()
        return made

    def step(m: int) -> dict:
        return {
            "qkv": bf16(1, c.conv_channels, device=device),
            "alpha": bf16(1, heads, device=device),
            "beta_raw": bf16(1, heads, device=device),
            "A_log": bf16(heads, device=device),
            "dt_bias": bf16(heads, device=device),
            "state": torch.zeros(1, heads, dim, dim, dtype=torch.bfloat16, device=device),
        }

    contenders = [Contender("gated_delta_rule", gated_delta_rule, ours)]
    if wheel and hasattr(wheel, "fused_deltanet_decode"):
        one = wheel.fused_deltanet_decode
        contenders.append(
            Contender("fused_deltanet_decode", one, step, lambda m: m == 1, peer=True)
        )
    if wheel and hasattr(wheel, "chunk_gated_delta_rule"):
        many = wheel.chunk_gated_delta_rule
        contenders.append(
            Contender("chunk_gated_delta_rule", many, theirs, lambda m: m > 1, peer=True)
        )

    return Subject("delta rule", lambda m: roofline.delta_rule(m, c), contenders)


def attend(device: torch.device, wheel: ModuleType | None) -> Subject:
    """Attention of one token after 4095 cached ones, or of several with an empty cache.

    The wheel's kernels only attend; its module leaves RoPE, QK-norm, the cache's update and the
    output gate to torch's compiler.
    """
    c, capacity = CONFIG, 4096
    heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    pool = (capacity // PAGE_SIZE, kv, PAGE_SIZE, dim)

    def ours(m: int) -> dict:
        return {
            "qkv": bf16(m, 2 * (heads + kv) * dim, device=device),
            "q_norm": bf16(dim, device=device),
            "k_norm": bf16(dim, device=device),
            "inv_freq": torch.rand(c.rotary_dim // 2, device=device),
            "k_cache": bf16(*pool, device=device),
            "v_cache": bf16(*pool, device=device),
            "pages": torch.arange(pool[0], dtype=torch.int32, device=device)[None],
            "positions": torch.full((1,), capacity - 1 if m == 1 else 0, device=device),
        }

    def theirs(m: int) -> dict:
        seen = capacity if m == 1 else m
        return {
            "query": bf16(1, heads, m, dim, device=device),
            "key": bf16(1, kv, seen, dim, device=device),
            "value": bf16(1, kv, seen, dim, device=device),
            "is_causal": m > 1,
            "enable_gqa": True,
        }

    def between(m: int) -> dict:
        first = capacity - 1 if m == 1 else 0
        return {
            "qkv": bf16(m, 2 * (heads + kv) * dim, device=device),
            "input_pos": torch.arange(first, first + m, device=device),
            "k_cache": bf16(1, kv, capacity, dim, device=device),
            "v_cache": bf16(1, kv, capacity, dim, device=device),
        }

    contenders = [Contender("attention", attention, ours)]
    if wheel:
        one, many = wheel.sdpa_decode_splitk, wheel.sdpa
        contenders += [
            Contender("sdpa_decode_splitk", one, theirs, lambda m: m == 1, peer=True, part=True),
            Contender("sdpa", many, theirs, lambda m: m > 1, peer=True, part=True),
        ]
        if module := peer_attention.load(c, capacity, device):
            name, takes = "attention of its Qwen3.5 module", peer_attention.TOKENS.__contains__
            contenders.append(Contender(name, module, between, takes, peer=True))
    return Subject(
        "attention", lambda m: roofline.attention(m, c, capacity - 1 if m == 1 else 0), contenders
    )


def without_peer(device: torch.device) -> list[Subject]:
    """What the wheel has no kernel for."""
    c = CONFIG
    heads, dim, channels = c.linear_num_value_heads, 128, c.conv_channels

    def net(m: int) -> dict:
        return {
            "projected": bf16(m, channels + heads * dim + 2 * heads, device=device),
            "conv_weight": bf16(channels, c.linear_conv_kernel_dim, device=device),
            "a_log": torch.randn(heads, device=device),
            "dt_bias": torch.randn(heads, device=device),
            "norm_weight": bf16(dim, device=device),
            "conv_state": bf16(1, c.linear_conv_kernel_dim - 1, channels, device=device),
            "recurrent_state": torch.zeros(1, heads, dim, dim, device=device),
            "slots": torch.zeros(1, dtype=torch.int32, device=device),
        }

    def route(m: int) -> dict:
        return {
            "x": bf16(m, c.hidden_size, device=device),
            "norm_weight": bf16(c.hidden_size, device=device),
            "weight": bf16(c.num_experts + 1, c.hidden_size, device=device) * 0.02,
            "top_k": c.num_experts_per_tok,
            "num_shared": 1,
        }

    def draw(m: int) -> dict:
        def scalar(value, dtype=torch.int64):
            return torch.tensor([value], dtype=dtype, device=device)

        logits = torch.randn(1, c.vocab_size, device=device) * 4
        options = (scalar(0.6, torch.float32), scalar(20), scalar(0.95, torch.float32))
        names = ("logits", "temperature", "top_k", "top_p", "seed", "positions")
        return dict(zip(names, (logits, *options, scalar(1), scalar(1)), strict=True))

    one = [Contender("sample", sample, draw, lambda m: m == 1)]
    return [
        Subject(
            "gated delta net",
            lambda m: roofline.delta_net(m, c),
            [Contender("gated_delta_net", gated_delta_net, net)],
        ),
        Subject(
            "router", lambda m: roofline.router(m, c), [Contender("moe_router", moe_router, route)]
        ),
        Subject("sample", lambda m: roofline.sample(c), one),
    ]


def load_wheel() -> ModuleType | None:
    """The wheel's kernels, or None with a message."""
    try:
        wheel = importlib.import_module(WHEEL)
    except Exception as e:  # whatever keeps the peer from loading, ours can be measured
        print(f"{WHEEL} cannot be imported ({type(e).__name__}: {e}): no comparison with it")
        return None
    if not hasattr(wheel, "chunk_gated_delta_rule"):
        print("flash-linear-attention==0.4.2 is not installed: no comparison of the delta rule")
    return wheel


def subjects(device: torch.device, wheel: ModuleType | None, only: str) -> Iterator[Subject]:
    """Yields the subjects whose names contain `only`.

    One is built after the other, so that the weights of all need not fit into memory at once.
    """
    shapes = {
        "in_proj": (12352, 2048),
        "qkv_proj": (9216, 2048),
        "out_proj": (2048, 4096),
    }
    makers: dict[str, Callable[[], Subject]] = {"experts": lambda: experts(device, wheel)}
    for name, (n, k) in shapes.items():
        makers[name] = lambda name=name, n=n, k=k: dense(name, n, k, device, wheel)
    makers["delta rule"] = lambda: delta_rule(device, wheel)
    makers["attention"] = lambda: attend(device, wheel)
    for name, make in makers.items():
        if only in name:
            yield make()
    yield from (s for s in without_peer(device) if only in s.name)
