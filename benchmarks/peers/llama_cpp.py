"""llama.cpp as a peer: a random GGUF of the model's shape, and `llama-bench` on it.

llama.cpp's source is taken from the `llama-cpp-python` package, of which 0.3.36 (ggml 0.25.3) was
checked: its architecture `qwen35moe` is this model. On a machine with a CUDA compiler:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release \\
      -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90 -DLLAMA_BUILD_TESTS=OFF -DLLAMA_OPENSSL=OFF \\
      -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
    cmake --build llama --target llama-bench -j

Matrices are Q4_0 (4.5 bits a weight; ours have 4.125), the embedding is Q8_0, router and norms are
fp32.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy

from et_moe.backends.atomic_file import atomic_file
from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.make_bundle import WEIGHT_RMS

ARCHITECTURE = "qwen35moe"
BLOCK = 32
"""Weights that share a scale in Q4_0 and Q8_0."""

_RMS = {"Q4_0": ((16**2 - 1) / 12 + 0.25) ** 0.5, "Q8_0": ((256**2 - 1) / 12 + 0.25) ** 0.5}
_BLOCK_BYTES = {"Q4_0": 2 + BLOCK // 2, "Q8_0": 2 + BLOCK}

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def tensor_shapes(c: ModelConfig) -> Shapes:
    """Name -> type and shape (rows first) of every tensor, as llama.cpp's loader expects them."""
    hidden, inner, experts = c.hidden_size, c.moe_intermediate_size, c.num_experts
    shared, heads = c.shared_expert_intermediate_size, c.linear_num_value_heads
    queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    shapes: Shapes = {
        "token_embd.weight": ("Q8_0", (c.vocab_size, hidden)),
        "output_norm.weight": ("F32", (hidden,)),
        "output.weight": ("Q4_0", (c.vocab_size, hidden)),
    }
    linear_attention: Shapes = {
        "attn_qkv.weight": ("Q4_0", (c.conv_channels, hidden)),
        "attn_gate.weight": ("Q4_0", (c.linear_value_width, hidden)),
        "ssm_conv1d.weight": ("F32", (c.conv_channels, c.linear_conv_kernel_dim)),
        "ssm_dt.bias": ("F32", (heads,)),
        "ssm_a": ("F32", (heads,)),
        "ssm_alpha.weight": ("Q4_0", (heads, hidden)),
        "ssm_beta.weight": ("Q4_0", (heads, hidden)),
        "ssm_norm.weight": ("F32", (c.linear_value_head_dim,)),
        "ssm_out.weight": ("Q4_0", (hidden, c.linear_value_width)),
    }
    full_attention: Shapes = {
        "attn_q.weight": ("Q4_0", (2 * queries, hidden)),
        "attn_k.weight": ("Q4_0", (keys, hidden)),
        "attn_v.weight": ("Q4_0", (keys, hidden)),
        "attn_output.weight": ("Q4_0", (hidden, queries)),
        "attn_q_norm.weight": ("F32", (c.head_dim,)),
        "attn_k_norm.weight": ("F32", (c.head_dim,)),
    }
    common: Shapes = {
        "attn_norm.weight": ("F32", (hidden,)),
        "post_attention_norm.weight": ("F32", (hidden,)),
        "ffn_gate_inp.weight": ("F32", (experts, hidden)),
        "ffn_gate_up_exps.weight": ("Q4_0", (experts, 2 * inner, hidden)),
        "ffn_down_exps.weight": ("Q4_0", (experts, hidden, inner)),
        "ffn_gate_inp_shexp.weight": ("F32", (hidden,)),
        "ffn_gate_shexp.weight": ("Q4_0", (shared, hidden)),
        "ffn_up_shexp.weight": ("Q4_0", (shared, hidden)),
        "ffn_down_shexp.weight": ("Q4_0", (hidden, shared)),
    }
    for i, kind in enumerate(c.layer_types):
        mixer = linear_attention if kind == "linear_attention" else full_attention
        shapes |= {f"blk.{i}.{name}": entry for name, entry in (common | mixer).items()}
    return shapes


def random_tensor(
    name: str, kind: str, shape: tuple[int, ...], generator: numpy.random.Generator
) -> numpy.ndarray:
    """`float32` of the shape, or the `uint8` blocks `[..., K / 32 * bytes of a block]`."""
    if kind == "F32":
        if name.endswith("norm.weight") or name.endswith("ssm_dt.bias"):
            return numpy.ones(shape, dtype=numpy.float32)
        if name.endswith("ssm_a"):  # -exp(A_log)
            return -(0.01 + 15.99 * generator.random(shape, dtype=numpy.float32))
        return WEIGHT_RMS * generator.standard_normal(shape, dtype=numpy.float32)
    *rows, columns = shape
    if columns % BLOCK:
        raise ConfigError(f"{name}: {kind} needs rows of a multiple of {BLOCK}, not {columns}")
    count, size = numpy.prod(shape) // BLOCK, _BLOCK_BYTES[kind]
    blocks = numpy.frombuffer(generator.bytes(count * size), dtype=numpy.uint8).copy()
    blocks = blocks.reshape(count, size)
    scale = (0.5 + generator.random((count, 1), dtype=numpy.float32)) * (WEIGHT_RMS / _RMS[kind])
    blocks[:, :2] = scale.astype(numpy.float16).view(numpy.uint8)
    return blocks.reshape(*rows, columns // BLOCK * size)


def _interval(c: ModelConfig) -> int:
    """The interval of layers with full attention, which llama.cpp has instead of their list."""
    interval = (*c.layer_types, "full_attention").index("full_attention") + 1
    for i, kind in enumerate(c.layer_types):
        if (kind == "full_attention") != ((i + 1) % interval == 0):
            raise ConfigError(f"layer {i} is {kind}: llama.cpp wants full attention at intervals")
    return interval


def _add_metadata(writer, c: ModelConfig) -> None:
    if c.linear_key_head_dim != c.linear_value_head_dim:
        raise ConfigError("llama.cpp wants linear_key_head_dim and linear_value_head_dim equal")
    half = c.rotary_dim // 2
    first = -(-half // 3)
    second = -(-(half - first) // 2)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.rotary_dim)
    writer.add_rope_dimension_sections([first, second, half - first - second, 0])
    writer.add_full_attention_interval(_interval(c))
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
    writer.add_ssm_inner_size(c.linear_value_width)
    writer.add_ssm_state_size(c.linear_key_head_dim)
    writer.add_ssm_time_step_rank(c.linear_num_value_heads)
    writer.add_ssm_group_count(c.linear_num_key_heads)


def write_gguf(path: Path, c: ModelConfig, seed: int = 0) -> None:
    """Writes a random model of a shape by way of `atomic_file`, one tensor in memory.

    Raises:
        ConfigError: a shape that llama.cpp does not support.
    """
    import gguf

    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    _add_metadata(writer, c)
    shapes = tensor_shapes(c)
    for name, (kind, shape) in shapes.items():
        if kind == "F32":
            size = 4 * int(numpy.prod(shape))
            writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), size)
        else:
            stored = (*shape[:-1], shape[-1] // BLOCK * _BLOCK_BYTES[kind])
            quantization = gguf.GGMLQuantizationType[kind]
            size = int(numpy.prod(stored))
            writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), size, quantization)
    generator = numpy.random.Generator(numpy.random.SFC64(seed))
    with atomic_file(path) as file:
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (kind, shape) in shapes.items():
            writer.write_tensor_data(random_tensor(name, kind, shape, generator))


def run_bench(
    binary: Path, model: Path, prompts: list[int], new_tokens: int, repetitions: int = 5
) -> Iterator[dict]:
    """Yields rows of each prompt's prefill, and of decode after it.

    Both micro-batch sizes that suit a GPU are tried; a row has the median of the repetitions.
    """
    lengths = ",".join(map(str, prompts))
    command = [binary, "-m", model, "-o", "json", "-r", str(repetitions), "-ngl", "999"]
    command += ["-fa", "on", "-ub", "512,2048"]
    work = {"prefill": ["-p", lengths, "-n", "0"], "decode": ["-p", "0", "-n", str(new_tokens)]}
    work["decode"] += ["-d", lengths]
    for phase, arguments in work.items():
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        if done.returncode:
            error = done.stderr.strip()[-500:] or f"exit code {done.returncode}"
            yield {"peer": "llama.cpp", "phase": phase, "variant": "Q4_0", "error": error}
            continue
        for made in json.loads(done.stdout):
            yield {
                "peer": "llama.cpp",
                "phase": phase,
                "variant": f"Q4_0, {made['backends']}, micro-batch {made['n_ubatch']}",
                "prompt": made["n_prompt"] if phase == "prefill" else made["n_depth"],
                "tok_s": float(numpy.median(made["samples_ts"])),
            }
