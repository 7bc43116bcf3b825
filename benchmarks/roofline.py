"""Bytes, operations and launches of Qwen3.5 MoE on a GPU, derived from shapes alone.

A kernel takes at least the time of its bytes or that of its operations. Every tensor is read or
written once; what a kernel reads again is assumed to come from the L2 cache. Scales of INT4 groups
count, those of INT8 rows do not.
"""

import dataclasses

from rich.console import Console
from rich.table import Table

from et_moe.backends.cuda.triton.common.tokens import DECODE_TOKENS
from et_moe.backends.cuda.triton.linear.decode import supports_k
from et_moe.examples.qwen3_5_moe.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        bytes: moved from and to global memory.
        int8: multiplications and additions on INT8 operands; bf16: on bf16 or fp32 operands.
    """

    name: str
    bytes: float
    int8: float = 0.0
    bf16: float = 0.0

    def seconds(self, bandwidth: float, int8: float, bf16: float) -> float:
        """At least, with bytes and operations per second."""
        return max(self.bytes / bandwidth, self.int8 / int8 + self.bf16 / bf16)


def linear(name: str, m: int, k: int, n: int, residual: bool, group: int = 128) -> list[Kernel]:
    """`linear_w4a8`: INT4 weights `[n, k]` with bf16 scales, bf16 activations."""
    weights = n * k / 2 + n * k / group * 2
    outside = 2 * m * (k + n + (n if residual else 0))
    operations = 2.0 * m * n * k
    if m == 1 and supports_k(k):
        return [Kernel(name, weights + outside, operations)]
    return [
        Kernel(f"{name}: quantize", 3 * m * k),
        Kernel(name, weights + outside - m * k, operations),
    ]


def embedding(m: int, c: ModelConfig) -> list[Kernel]:
    """`embedding_w8`."""
    return [Kernel("embedding", m * c.hidden_size * 3)]


def router(m: int, c: ModelConfig) -> list[Kernel]:
    """`moe_router`; logits in fp32."""
    hidden, rows = c.hidden_size, c.num_experts + 1
    slots = 8 * m * (c.num_experts_per_tok + c.shared_experts)
    weights, operations = 2 * rows * hidden, 2.0 * m * rows * hidden
    choose = Kernel("router: choose", 4 * m * rows + slots)
    if m <= DECODE_TOKENS:
        logits = Kernel("router: logits", weights + 4 * m * (hidden + rows), bf16=operations)
        return [logits, choose]
    return [
        Kernel("router: norm, gate", 4 * m * hidden),
        Kernel("router: logits", weights + 2 * m * hidden + 4 * m * rows, bf16=operations),
        choose,
    ]


def experts(m: int, c: ModelConfig, group: int = 128) -> list[Kernel]:
    """`moe_w4a8`; distinct experts are those that uniform routing touches on average."""
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    pairs = m * (c.num_experts_per_tok + c.shared_experts)
    touched = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** m)
    matrix = (touched + c.shared_experts) * hidden * inner * (1 / 2 + 2 / group)
    operations = 2.0 * pairs * hidden * inner
    if m <= DECODE_TOKENS:
        return [
            Kernel(
                "experts: gate, up", 2 * matrix + 2 * m * hidden + 4 * pairs * inner, 2 * operations
            ),
            Kernel("experts: down", matrix + 4 * pairs * inner + 4 * m * hidden, operations),
        ]
    return [
        Kernel("experts: route", 8 * pairs),
        Kernel("experts: quantize", 3 * m * hidden),
        Kernel("experts: gate, up", 2 * matrix + m * hidden + pairs * inner, 2 * operations),
        Kernel("experts: down", matrix + pairs * inner + 2 * pairs * hidden, operations),
        Kernel("experts: sum", 2 * pairs * hidden + 4 * m * hidden),
    ]


def delta_rule(m: int, c: ModelConfig, chunk: int = 64) -> list[Kernel]:
    """`gated_delta_rule`; of one token with the gates and the norm of the layer."""
    heads, dk, dv = c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
    channels, values, state = c.conv_channels, c.linear_value_width, heads * dk * dv
    if m == 1:
        outside = 2 * (channels + 2 * values + 2 * heads)
        return [Kernel("delta net: step", outside + 8 * state, bf16=8.0 * state)]
    square = 2.0 * m * heads * chunk
    prepared = 3 * square + 12 * m * heads
    return [
        Kernel(
            "delta net: prepare",
            4 * m * (c.linear_key_width + heads) + prepared,
            bf16=square * (2 * dk + 4 * chunk),
        ),
        Kernel(
            "delta net: scan",
            2 * m * (channels + values) + prepared + 8 * state,
            bf16=6.0 * m * state + square * 3 * dv,
        ),
    ]


def delta_net(m: int, c: ModelConfig) -> list[Kernel]:
    """`gated_delta_net`: convolution, delta rule, gated norm."""
    channels, taps = c.conv_channels, c.linear_conv_kernel_dim
    if m == 1:
        moved = 2 * channels * (3 * taps)
        return [
            Kernel("delta net: convolution", moved, bf16=2.0 * channels * taps),
            *delta_rule(m, c),
        ]
    return [
        Kernel("delta net: convolution", 4 * m * channels, bf16=2.0 * m * channels * taps),
        *delta_rule(m, c),
        Kernel("delta net: norm", 6 * m * c.linear_value_width),
    ]


def projected_delta_net(m: int, c: ModelConfig) -> list[Kernel]:
    """`delta_net` with the projection in front of it, which in decode ends with the convolution."""
    width = c.conv_channels + c.linear_value_width + 2 * c.linear_num_value_heads
    projection, net = linear("in_proj", m, c.hidden_size, width, False), delta_net(m, c)
    if m > 1 or len(projection) > 1:
        return projection + net
    own_columns = 2 * 2 * c.conv_channels  # the convolution's input and output need no memory
    fused = dataclasses.replace(
        projection[0],
        name="in_proj, convolution",
        bytes=projection[0].bytes + net[0].bytes - own_columns,
        bf16=net[0].bf16,
    )
    return [fused, *net[1:]]


def attention(m: int, c: ModelConfig, context: int) -> list[Kernel]:
    """`attention`: m tokens after `context` cached ones."""
    heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    qkv = 2 * m * dim * 2 * (heads + kv)
    seen = m * context + m * (m + 1) / 2
    operations = 4.0 * seen * heads * dim
    cache, out = 4 * kv * dim * (context + m), 2 * m * heads * dim
    if m == 1:
        return [
            Kernel("attention: splits", qkv + cache, bf16=operations),
            Kernel("attention: combine", 2 * out),
        ]
    return [
        Kernel("attention: append", qkv + out + 4 * m * kv * dim),
        Kernel("attention", cache + 3 * out, bf16=operations),
    ]


def layer(kind: str, m: int, c: ModelConfig, context: int = 0) -> list[Kernel]:
    """A decoder layer, `kind` as in `ModelConfig.layer_types`."""
    hidden = c.hidden_size
    if kind == "linear_attention":
        mixer = projected_delta_net(m, c) + linear(
            "out_proj", m, c.linear_value_width, hidden, True
        )
    else:
        queries = c.num_attention_heads * c.head_dim
        width = 2 * queries + 2 * c.num_key_value_heads * c.head_dim
        mixer = linear("qkv_proj", m, hidden, width, False) + attention(m, c, context)
        mixer += linear("o_proj", m, queries, hidden, True)
    return mixer + router(m, c) + experts(m, c)


def sample(c: ModelConfig) -> list[Kernel]:
    """`sample` with top-k or top-p."""
    logits = 4.0 * c.vocab_size
    return [
        Kernel("sample: blocks", logits),
        Kernel("sample: collect", logits),
        Kernel("sample: finish", 0.0),
    ]


def model(m: int, c: ModelConfig, context: int = 0) -> list[Kernel]:
    """One call of the model: m tokens, one token drawn."""
    kernels = embedding(m, c)
    for kind in c.layer_types:
        kernels += layer(kind, m, c, context)
    return kernels + linear("lm_head", 1, c.hidden_size, c.vocab_size, False) + sample(c)


def batch_step(sequences: int, c: ModelConfig, context: int, state_bytes: int = 4) -> list[Kernel]:
    """One decoded token of each of several sequences with so many cached tokens, and with so many
    bytes a number of the recurrent state.

    What works on rows costs what as many rows of a prompt cost; the state of each sequence is read
    and written for itself. Launches are not those that are made.
    """
    heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    state = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    kernels = embedding(sequences, c)
    for kind in c.layer_types:
        if kind == "linear_attention":
            width = c.conv_channels + c.linear_value_width + 2 * c.linear_num_value_heads
            kernels += linear("in_proj", sequences, c.hidden_size, width, False)
            moved = 2 * state_bytes * state + 4 * c.conv_channels * c.linear_conv_kernel_dim
            kernels.append(Kernel("delta net", sequences * moved, bf16=8.0 * sequences * state))
            kernels += linear("out_proj", sequences, c.linear_value_width, c.hidden_size, True)
        else:
            width = 2 * (heads + kv) * dim
            kernels += linear("qkv_proj", sequences, c.hidden_size, width, False)
            cache, operations = 4 * kv * dim * (context + 1), 4.0 * context * heads * dim
            kernels.append(Kernel("attention", sequences * cache, bf16=sequences * operations))
            kernels += linear("o_proj", sequences, heads * dim, c.hidden_size, True)
        kernels += router(sequences, c) + experts(sequences, c)
    kernels += linear("lm_head", sequences, c.hidden_size, c.vocab_size, False)
    return [*kernels, Kernel("sample", 8.0 * sequences * c.vocab_size)]


def print_costs(
    tokens: int, context: int, roof: dict[str, float], launch: float, c: ModelConfig
) -> None:
    """Prints the cost of a layer of each kind and of the model, in decode and prefill.

    Args:
        tokens: length of the prompt; context: cached tokens in decode.
        roof: as the arguments of `Kernel.seconds`.
        launch: microseconds between two kernels.
    """
    console = Console(width=110)
    for title, m, cached in (("decode", 1, context), ("prefill", tokens, 0)):
        table = Table(
            "kernel", "MB", "GOP int8", "GOP bf16", "least us", title=f"{title}, {m} tokens"
        )
        for kind in dict.fromkeys(c.layer_types):
            kernels = layer(kind, m, c, cached)
            for k in kernels:
                row = (k.bytes / 1e6, k.int8 / 1e9, k.bf16 / 1e9, k.seconds(**roof) * 1e6)
                table.add_row(k.name, *(f"{value:.2f}" for value in row))
            least = sum(k.seconds(**roof) for k in kernels) * 1e6
            moved = sum(k.bytes for k in kernels) / 1e6
            name = f"{kind}: {len(kernels)} launches"
            table.add_row(name, f"{moved:.2f}", "", "", f"{least:.2f}", end_section=True)
        console.print(table)
        kernels = model(m, c, cached)
        work = sum(k.seconds(**roof) for k in kernels)
        gaps = len(kernels) * launch * 1e-6
        print(
            f"{title}: {sum(k.bytes for k in kernels) / 1e9:.2f} GB, {len(kernels)} launches, "
            f"at least {work * 1e3:.3f} ms = {m / work:.0f} tokens/s; "
            f"{m / (work + gaps):.0f} with {launch} us per launch"
        )
