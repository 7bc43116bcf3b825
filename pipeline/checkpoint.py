"""Reads a Hugging Face checkpoint of Qwen3.5 MoE and fuses its tensors into the model's parameters.

Nothing is loaded until a group (the embedding, one layer, the head) is asked for, so memory stays
at one group whatever the checkpoint's size.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from et_moe.pipeline.config import ConfigError, ModelConfig, load_config, read_json

PREFIXES = ("model.language_model.", "model.")
SKIPPED_PREFIXES = ("model.visual.", "visual.", "model.mtp.", "mtp.")
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Shapes = dict[str, tuple[int, ...]]
Parts = list[Tensor]
"""Tensors that make up one parameter when concatenated along dimension 0."""


def _mixer_shapes(c: ModelConfig, layer: int) -> Shapes:
    h, name = c.hidden_size, f"layers.{layer}"
    if c.layer_types[layer] == "linear_attention":
        heads, values, mixer = c.linear_num_value_heads, c.linear_value_width, f"{name}.linear_attn"
        return {
            f"{mixer}.in_proj_qkv.weight": (c.conv_channels, h),
            f"{mixer}.in_proj_z.weight": (values, h),
            f"{mixer}.in_proj_b.weight": (heads, h),
            f"{mixer}.in_proj_a.weight": (heads, h),
            f"{mixer}.conv1d.weight": (c.conv_channels, 1, c.linear_conv_kernel_dim),
            f"{mixer}.A_log": (heads,),
            f"{mixer}.dt_bias": (heads,),
            f"{mixer}.norm.weight": (c.linear_value_head_dim,),
            f"{mixer}.out_proj.weight": (h, values),
        }
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    mixer = f"{name}.self_attn"
    return {
        f"{mixer}.q_proj.weight": (2 * queries, h),
        f"{mixer}.k_proj.weight": (keys, h),
        f"{mixer}.v_proj.weight": (keys, h),
        f"{mixer}.o_proj.weight": (h, queries),
        f"{mixer}.q_norm.weight": (c.head_dim,),
        f"{mixer}.k_norm.weight": (c.head_dim,),
    }


def expected_shapes(c: ModelConfig, fused_experts: bool) -> Shapes:
    """Every text tensor of a checkpoint, by its name after the prefix."""
    h, i, shared = c.hidden_size, c.moe_intermediate_size, c.shared_expert_intermediate_size
    shapes: Shapes = {"embed_tokens.weight": (c.vocab_size, h), "norm.weight": (h,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, h)
    for layer in range(c.num_hidden_layers):
        name = f"layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (h,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (h,)
        shapes |= _mixer_shapes(c, layer)
        shapes |= {
            f"{name}.mlp.gate.weight": (c.num_experts, h),
            f"{name}.mlp.shared_expert_gate.weight": (1, h),
            f"{name}.mlp.shared_expert.gate_proj.weight": (shared, h),
            f"{name}.mlp.shared_expert.up_proj.weight": (shared, h),
            f"{name}.mlp.shared_expert.down_proj.weight": (h, shared),
        }
        experts = f"{name}.mlp.experts"
        if fused_experts:
            shapes[f"{experts}.gate_up_proj"] = (c.num_experts, 2 * i, h)
            shapes[f"{experts}.down_proj"] = (c.num_experts, h, i)
        else:
            for e in range(c.num_experts):
                shapes[f"{experts}.{e}.gate_proj.weight"] = (i, h)
                shapes[f"{experts}.{e}.up_proj.weight"] = (i, h)
                shapes[f"{experts}.{e}.down_proj.weight"] = (h, i)
    return shapes


def _list_names(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint or bundle, sharded or single."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise ConfigError(f"{directory}: neither model.safetensors nor {index.name} is there")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: weight_map must map tensor names to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: {name!r} is not the name of a file beside it")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: no such file, named by {index.name}")
    return files


def open_safetensors(path: Path):
    """`safetensors.safe_open`, with errors that name the file."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise ConfigError(f"{path}: not a valid safetensors file: {e}") from None


class Checkpoint:
    """A checkpoint directory whose tensors were checked against its configuration.

    Args:
        directory: holds `config.json` and safetensors, sharded or single, with fused or per-expert
            expert tensors, prefixed `model.` or `model.language_model.`, in bf16, fp16 or fp32.

    Attributes:
        config: the model's shape.
        skipped: how many vision and MTP tensors were passed over.

    Raises:
        ConfigError: names the file, tensor or key at fault.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.config, self.skipped = directory, load_config(directory), 0
        self._files: dict[str, Path] = {}
        self._names: dict[str, str] = {}
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in shard_files(directory):
            with open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if name.startswith(SKIPPED_PREFIXES):
                        self.skipped += 1
                        continue
                    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
                    short = name.removeprefix(prefix)
                    if short in found:
                        raise ConfigError(f"{file}: {name} is there twice")
                    piece = tensors.get_slice(name)
                    found[short] = (piece.get_dtype(), tuple(piece.get_shape()))
                    self._files[short], self._names[short] = file, name
        self.fused_experts = any(n.endswith("mlp.experts.gate_up_proj") for n in found)
        self._check(found)

    def _check(self, found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        expected = expected_shapes(self.config, self.fused_experts)
        if self.config.tie_word_embeddings:
            found.pop("lm_head.weight", None)  # a copy of the embedding; Hugging Face ignores it
        missing = [n for n in expected if n not in found]
        unexpected = [self._names[n] for n in found if n not in expected]
        wrong = {"missing": missing, "unexpected": unexpected}
        lists = [f"{what} tensors: {_list_names(names)}" for what, names in wrong.items() if names]
        if lists:
            raise ConfigError(f"{self.directory}: {'; '.join(lists)}")
        for name, (dtype, shape) in found.items():
            where = f"{self._files[name]}: {self._names[name]}"
            if dtype not in FLOAT_DTYPES:
                raise ConfigError(f"{where} has dtype {dtype}, expected one of {[*FLOAT_DTYPES]}")
            if shape != expected[name]:
                raise ConfigError(f"{where} has shape {shape}, config.json asks {expected[name]}")

    def groups(self) -> Iterator[dict[str, Parts]]:
        """The model's parameters, group by group: the embedding, each layer, norm and head.

        Yields:
            Parameter name (as in `model.Qwen3_5Moe`, before quantization) to its parts, on the CPU
            in the checkpoint's dtype. A group's tensors may view mapped files: drop them before
            the next group.
        """
        yield {"embed_tokens.weight": [self._read("embed_tokens.weight")]}
        for layer in range(self.config.num_hidden_layers):
            yield self._layer(layer)
        head = "embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        yield {"norm.weight": [self._read("norm.weight")], "lm_head.weight": [self._read(head)]}

    def _read(self, name: str) -> Tensor:
        with ExitStack() as stack:
            tensors = stack.enter_context(open_safetensors(self._files[name]))
            return tensors.get_tensor(self._names[name])

    def _layer(self, layer: int) -> dict[str, Parts]:
        c, name = self.config, f"layers.{layer}"

        def read(*names: str) -> Parts:
            return [self._read(f"{name}.{n}.weight") for n in names]

        group = {f"{name}.input_layernorm.weight": read("input_layernorm")}
        if c.layer_types[layer] == "linear_attention":
            m = "linear_attn"
            taps = self._read(f"{name}.{m}.conv1d.weight").squeeze(1)
            group |= {
                f"{name}.{m}.in_proj.weight": read(
                    *(f"{m}.in_proj_{p}" for p in ["qkv", "z", "b", "a"])
                ),
                f"{name}.{m}.conv1d.weight": [taps],
                f"{name}.{m}.A_log": [self._read(f"{name}.{m}.A_log")],
                f"{name}.{m}.dt_bias": [self._read(f"{name}.{m}.dt_bias")],
                f"{name}.{m}.norm.weight": read(f"{m}.norm"),
                f"{name}.{m}.out_proj.weight": read(f"{m}.out_proj"),
            }
        else:
            m = "self_attn"
            group |= {
                f"{name}.{m}.qkv_proj.weight": read(*(f"{m}.{p}_proj" for p in "qkv")),
                f"{name}.{m}.q_norm.weight": read(f"{m}.q_norm"),
                f"{name}.{m}.k_norm.weight": read(f"{m}.k_norm"),
                f"{name}.{m}.o_proj.weight": read(f"{m}.o_proj"),
                f"{name}.{m}.inv_freq": [inverse_frequencies(c)],
            }
        experts = f"{name}.mlp.experts"
        return group | {
            f"{name}.post_attention_layernorm.weight": read("post_attention_layernorm"),
            f"{name}.mlp.gate.weight": read("mlp.gate", "mlp.shared_expert_gate"),
            f"{experts}.w13": [*self._experts(experts, "gate", "up"), *self._shared_w13(name)],
            f"{experts}.w2": [*self._experts(experts, "down"), *self._shared_w2(name)],
        }

    def _experts(self, name: str, *projections: str) -> Parts:
        if self.fused_experts:
            return [self._read(f"{name}.{'_'.join(projections)}_proj")]
        return [
            torch.cat([self._read(f"{name}.{e}.{p}_proj.weight") for p in projections])[None]
            for e in range(self.config.num_experts)
        ]

    def _shared_w13(self, name: str) -> Parts:
        """The shared expert as further experts of the routed width, the last one zero-padded."""
        width, slots = self.config.moe_intermediate_size, self.config.shared_experts
        halves = []
        for p in ("gate", "up"):
            half = self._read(f"{name}.mlp.shared_expert.{p}_proj.weight")
            padding = half.new_zeros(slots * width - half.shape[0], half.shape[1])
            halves.append(torch.cat((half, padding)).view(slots, width, -1))
        return [torch.cat(halves, dim=1)]

    def _shared_w2(self, name: str) -> Parts:
        width, slots = self.config.moe_intermediate_size, self.config.shared_experts
        down = self._read(f"{name}.mlp.shared_expert.down_proj.weight")
        padding = down.new_zeros(down.shape[0], slots * width - down.shape[1])
        return [torch.cat((down, padding), dim=1).view(-1, slots, width).transpose(0, 1)]


def inverse_frequencies(c: ModelConfig) -> Tensor:
    """RoPE's theta^(-2i/R), `float32 [R/2]`, in Hugging Face's order of operations."""
    exponent = torch.arange(0, c.rotary_dim, 2, dtype=torch.int64).float() / c.rotary_dim
    return 1.0 / (c.rope_theta**exponent)


def parameter_count(c: ModelConfig) -> int:
    """Weights of a checkpoint of this configuration."""
    return sum(math.prod(s) for s in expected_shapes(c, fused_experts=True).values())
