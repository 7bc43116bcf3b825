"""The forward pass that the reference model is trained with, over a Hugging Face model's weights.

It computes what `Qwen3_5MoeForCausalLM` does, with the experts' rows sorted for grouped products,
the convolution as four products, and no caches, so that a layer compiles into few kernels. A layer
is a function of its parameters by name: layers of one kind share what is compiled.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import apply_rotary_pos_emb

Parameters = Mapping[str, Tensor]
"""The parameters of a layer by their names in it."""

CHUNK = 64
"""Tokens that the gated delta rule takes together."""


class _Sort(torch.autograd.Function):
    """Rows of tokens, repeated for each of their experts, by expert: `[T, H]` to `[T k, H]`."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.count = count
        return x[order // count]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        return grad[back].view(-1, ctx.count, grad.shape[-1]).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    """Rows by expert back to the order of the tokens."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[back]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The product of each expert's rows with its weight.

    Args:
        rows: `[S, K]`, by expert. weight: `[E, N, K]`. ends: int32 `[E]`, where the rows of each
            expert end.

    Returns:
        `[S, N]`.
    """
    if rows.is_cuda:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    pieces = zip(rows.split(counts), weight, strict=True)
    return torch.cat([piece @ matrix.T for piece, matrix in pieces])


def sparse_moe(p: Parameters, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """A mixture of experts of `x` `[T, H]`, and its load balancing loss, 1 if it is even."""
    logits = F.linear(x, p["gate.weight"])
    experts = logits.shape[-1]
    probabilities = logits.float().softmax(-1)
    weights, ids = probabilities.topk(top_k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    sorted_ids, order = ids.flatten().int().sort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    each = torch.arange(experts, device=ids.device, dtype=torch.int32)
    ends = torch.searchsorted(sorted_ids, each, right=True).int()
    rows = _Sort.apply(x, order, back, top_k)
    gate, up = grouped_linear(rows, p["experts.gate_up_proj"], ends).chunk(2, dim=-1)
    rows = grouped_linear(F.silu(gate) * up, p["experts.down_proj"], ends)
    routed = _Unsort.apply(rows, order, back).view(*ids.shape, x.shape[-1])
    routed = (routed * weights[..., None]).sum(1)

    gate, up = (F.linear(x, p[f"shared_expert.{name}_proj.weight"]) for name in ("gate", "up"))
    shared = F.linear(F.silu(gate) * up, p["shared_expert.down_proj.weight"])
    shared = F.linear(x, p["shared_expert_gate.weight"]).sigmoid() * shared
    share = torch.diff(ends, prepend=ends.new_zeros(1)).float() / len(order)
    balance = experts * (share * probabilities.mean(0)).sum()
    return routed + shared, balance


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Qwen3.5's norm, whose weight is an offset from 1."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(x.dtype)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule over whole sequences, a chunk at a time.

    Args:
        q, k: `[B, T, H, Dk]`; v: `[B, T, H, Dv]`; T is a multiple of `CHUNK`.
        g: log decays, float32 `[B, T, H]`; beta: `[B, T, H]`.

    Returns:
        float32 `[B, T, H, Dv]`.
    """

    def chunked(x: Tensor) -> Tensor:  # [B, H, chunks, CHUNK, ...]
        return x.float().transpose(1, 2).unflatten(2, (-1, CHUNK))

    q, k, v, g, beta = (chunked(x) for x in (q, k, v, g, beta))
    q, k = _unit(q) * q.shape[-1] ** -0.5, _unit(k)
    decay = g.cumsum(-1)
    apart = decay[..., :, None] - decay[..., None, :]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = apart.masked_fill(~later, float("-inf")).exp()
    k_beta = k * beta[..., None]
    system = (k_beta @ k.transpose(-1, -2)) * between
    wanted = torch.cat((v * beta[..., None], k_beta * decay.exp()[..., None]), dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    new, erased = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    inside = (q @ k.transpose(-1, -2)) * between
    q = q * decay.exp()[..., None]
    k = k * (decay[..., -1:] - decay).exp()[..., None]
    kept = decay[..., -1].exp()[..., None, None]
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    out = []
    for i in range(q.shape[2]):
        written = new[:, :, i] - erased[:, :, i] @ state
        out.append(q[:, :, i] @ state + inside[:, :, i] @ written)
        state = state * kept[:, :, i] + k[:, :, i].transpose(-1, -2) @ written
    return torch.stack(out, dim=2).flatten(2, 3).transpose(1, 2)


def linear_attention(p: Parameters, x: Tensor, c: Qwen3_5MoeTextConfig) -> Tensor:
    """A gated delta net of `x` `[B, T, H]`."""
    batch, tokens, _ = x.shape
    taps = c.linear_conv_kernel_dim
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    padded = F.pad(F.linear(x, p["in_proj_qkv.weight"]), (0, 0, taps - 1, 0)).float()
    kernel = p["conv1d.weight"].float()
    mixed = sum(padded[:, i : i + tokens] * kernel[:, 0, i] for i in range(taps))
    q, k, v = F.silu(mixed).to(x.dtype).split((keys, keys, values), dim=-1)
    repeats = c.linear_num_value_heads // c.linear_num_key_heads
    q, k = (
        part.unflatten(-1, (-1, c.linear_key_head_dim)).repeat_interleave(repeats, dim=2)
        for part in (q, k)
    )
    v, z = (
        part.unflatten(-1, (-1, c.linear_value_head_dim))
        for part in (v, F.linear(x, p["in_proj_z.weight"]))
    )
    beta = F.linear(x, p["in_proj_b.weight"]).sigmoid()
    rate = F.linear(x, p["in_proj_a.weight"]).float() + p["dt_bias"].float()
    softplus = torch.logaddexp(rate, rate.new_zeros(()))
    out = delta_rule(q, k, v, -p["A_log"].float().exp() * softplus, beta)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + c.rms_norm_eps)
    out = out * p["norm.weight"].float() * F.silu(z.float())
    return F.linear(out.to(x.dtype).reshape(batch, tokens, -1), p["out_proj.weight"])


def full_attention(
    p: Parameters, x: Tensor, c: Qwen3_5MoeTextConfig, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """Gated attention of `x` `[B, T, H]`."""

    def heads(name: str) -> Tensor:
        return F.linear(x, p[f"{name}_proj.weight"]).unflatten(-1, (-1, c.head_dim))

    q, gate = heads("q").unflatten(-2, (-1, 2)).unbind(-2)
    q = rms_norm(q, p["q_norm.weight"], c.rms_norm_eps).transpose(1, 2)
    k = rms_norm(heads("k"), p["k_norm.weight"], c.rms_norm_eps).transpose(1, 2)
    v = heads("v").transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *rotation)
    repeats = c.num_attention_heads // c.num_key_value_heads
    k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    out = out * gate.sigmoid()
    return F.linear(out.flatten(-2), p["o_proj.weight"])


def _inside(p: Parameters, module: str) -> Parameters:
    return {n.removeprefix(f"{module}."): t for n, t in p.items() if n.startswith(f"{module}.")}


def layer(
    p: Parameters, x: Tensor, c: Qwen3_5MoeTextConfig, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """A decoder layer of `x` `[B, T, H]`, and the load balancing loss of its experts."""
    normed = rms_norm(x, p["input_layernorm.weight"], c.rms_norm_eps)
    mixer = _inside(p, "linear_attn")
    if mixer:
        x = x + linear_attention(mixer, normed, c)
    else:
        x = x + full_attention(_inside(p, "self_attn"), normed, c, rotation)
    normed = rms_norm(x, p["post_attention_layernorm.weight"], c.rms_norm_eps)
    out, balance = sparse_moe(_inside(p, "mlp"), normed.flatten(0, 1), c.num_experts_per_tok)
    return x + out.view_as(x), balance


def head_loss(x: Tensor, norm: Tensor, weight: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Mean cross entropy of the tokens `targets` `[B, T]` behind hidden states `[B, T, H]`."""
    logits = F.linear(rms_norm(x, norm, eps), weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Forward:
    """The pass of one model, whose parameters may change between calls but not move.

    Args:
        compiled: whether layers are compiled on their first call.
    """

    def __init__(self, model: Qwen3_5MoeForCausalLM, compiled: bool) -> None:
        self._model, self._config = model, model.config
        self._layers = [dict(layer.named_parameters()) for layer in model.model.layers]
        self._layer, self._loss = layer, head_loss
        if compiled:
            self._layer = torch.compile(layer, dynamic=False)
            self._loss = torch.compile(head_loss, dynamic=False)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of the tokens behind the first, int64 `[B, T + 1]`, and the mean load
        balancing loss of the layers."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        model = self._model
        x = model.model.embed_tokens(inputs)
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand(3, 1, -1)
        rotation = model.model.rotary_emb(x, positions)
        balances = []
        for parameters in self._layers:
            x, balance = self._layer(parameters, x, self._config, rotation)
            balances.append(balance)
        norm, eps = model.model.norm.weight, self._config.rms_norm_eps
        loss = self._loss(x, norm, model.lm_head.weight, targets, eps)
        return loss, torch.stack(balances).mean()
