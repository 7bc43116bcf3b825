"""ExecuTorch's prequantized bundle: what `quantize_and_save` of its example `qwen3_5_moe` writes.

The weights have that example's names, and some of them are fused. A quantized weight is one of
torchao's tensors (`torchao.py`): its data are tensors of the file, and the metadata in the file's
header say in JSON which class of torchao's they belong to. The tables of experts are plain tensors:
`w1` int8 `[E, N, K/2]`, packed as a bundle's weights are, `w1_scale` `[E, N, K/g]`, and so `w2`.
"""

import json
import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from et_moe.backends import ops
from et_moe.pipeline.config import warn
from et_moe.pipeline.formats.format import Contents, HeaderError, StoredTensor, TensorError
from et_moe.pipeline.formats.int4 import SCALES
from et_moe.pipeline.formats.torchao import (
    CLASSES,
    Intx4Weight,
    IntxWeight,
    PackedExperts,
    Read,
    Weight,
)
from et_moe.pipeline.formats.unquantized import DTYPES
from et_moe.pipeline.storage import Int4

MODERN, LEGACY = "tensor_names", "quantization"
"""The key of a header's metadata by which the two forms are told: a list of the weights, each of
which has a key of its own; or an object with the quantized weights, as older versions wrote it."""

BUFFERS = (
    ".mask",
    ".inv_freq",
    ".k_cache",
    ".v_cache",
    ".conv_state",
    ".recurrent_state",
    ".cache_positions",
    "._rms_weight",
    "._qk_rms_weight",
)
"""What names of tensors end with that follow from the configuration or from other tensors."""

_FUSED = {
    "attn.qkv_proj.weight": tuple(f"self_attn.{p}_proj.weight" for p in "qkv"),
    "attn.in_proj.weight": tuple(f"linear_attn.in_proj_{p}.weight" for p in ("qkv", "z", "b", "a")),
    "mlp.shared_expert.gate_up_proj.weight": tuple(
        f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up")
    ),
}
_SINGLE = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.experts.w1": "mlp.experts.gate_up_proj",
    "mlp.experts.w2": "mlp.experts.down_proj",
    "mlp.experts.w1_weight": "mlp.experts.gate_up_proj",
    "mlp.experts.w2_weight": "mlp.experts.down_proj",
    **{f"attn.{n}.weight": f"self_attn.{n}.weight" for n in ("o_proj", "q_norm", "k_norm")},
    **{
        f"attn.{n}": f"linear_attn.{n}"
        for n in ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    },
}
"""Names of ExecuTorch's model inside a layer -> Hugging Face's; those of `_FUSED` have several."""

_EXPERT = re.compile(r"mlp\.experts\.(gate|up|down)_proj\.experts\.(\d+)\.weight")
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")


_PACKED = (".experts.w1", ".experts.w2")


def _inverse() -> dict[str, str]:
    theirs = {ours: name for name, several in _FUSED.items() for ours in several}
    for name, ours in _SINGLE.items():
        theirs.setdefault(ours, name)
    return theirs


_THEIRS = _inverse()


def their_name(name: str) -> str:
    """The name in ExecuTorch's model of the weight that a weight is a part of."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    prefix, inside = layer.groups()
    return prefix + _THEIRS.get(inside, inside)


def hugging_face_names(name: str) -> tuple[str, ...]:
    """The names of the weights, one below the other, that make up one of ExecuTorch's model."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return (name,)
    prefix, inside = layer.groups()
    inside = _EXPERT.sub(r"mlp.experts.\2.\1_proj.weight", inside)
    return tuple(prefix + n for n in _FUSED.get(inside, (_SINGLE.get(inside, inside),)))


def _parse(key: str, text: str, kind: type) -> dict | list:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise HeaderError(key, f"is not JSON: {e}") from None
    if not isinstance(value, kind):
        raise HeaderError(key, f"is {text[:80]}, expected a JSON {kind.__name__}")
    return value


def _quantized(metadata: Mapping[str, str]) -> Iterator[tuple[str, str, dict, str]]:
    """Name, class, attributes and the prefix of the stored data of each quantized weight."""
    if MODERN in metadata:
        for name in _parse(MODERN, metadata[MODERN], list):
            if not isinstance(name, str) or "." not in name or name not in metadata:
                raise HeaderError(MODERN, f"names {name!r}, of which the header says nothing")
            described = _parse(name, metadata[name], dict)
            kind, data = described.get("_type"), described.get("_data")
            if kind == "Tensor":
                continue
            if not isinstance(kind, str) or not isinstance(data, dict):
                raise HeaderError(name, "has no _type with _data")
            if "act_pre_scale" in (described.get("_tensor_data_names") or ()):
                raise HeaderError(name, "has scales of activations: use the bf16 checkpoint")
            module, _, leaf = name.rpartition(".")
            yield name, kind, data, f"{module}._{leaf}_"
        return
    for name, described in _parse(LEGACY, metadata[LEGACY], dict).items():
        if not isinstance(described, dict) or not isinstance(described.get("_type"), str):
            raise HeaderError(LEGACY, f"has no _type of {name}")
        yield name, described["_type"], described, f"{name}.__"


def _weight(name: str, kind: str, attributes: Mapping, prefix: str) -> Weight:
    """The reader of a quantized weight."""
    if kind not in CLASSES:
        expected = f"expected one of {[*CLASSES]}: use the bf16 checkpoint"
        raise HeaderError(name, f"is a {kind}; {expected}")
    reader, data = CLASSES[kind]
    block = attributes.get("block_size")
    valid = isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)
    if not valid or block[0] != 1 or block[1] < 1:
        raise HeaderError(name, f"has block_size {block!r}, expected [1, columns]")
    if reader is IntxWeight and _dtype(attributes.get("target_dtype")) == "int4":
        reader = Intx4Weight
    return reader(name, {d: prefix + d for d in data}, block[1])


def _dtype(value: object) -> object:
    """The name of a dtype, which is written in one of two ways."""
    text = value.get("_data") if isinstance(value, dict) else value
    return text.removeprefix("torch.") if isinstance(text, str) else text


class ExecuTorch:
    """See the module."""

    def __init__(self, contents: Contents) -> None:
        found = contents.tensors
        weights = [_weight(*entry) for entry in _quantized(contents.metadata)]
        weights += [_packed_experts(n, found) for n in found if n.endswith(_PACKED)]
        for weight in weights:
            for key in weight.keys.values():
                if key not in found:
                    raise HeaderError(weight.name, f"is quantized, but there is no tensor {key}")
        own = {key for weight in weights for key in weight.keys.values()}
        self.skipped = [n for n in found if n.endswith(BUFFERS)]
        own.update(self.skipped)
        self._kept = {weight.name: weight.kept(contents) for weight in weights}
        _say_what_is_not_kept(contents, [w for w in weights if self._kept[w.name] is None])
        weights += [Weight(name, {"": name}) for name in found if name not in own]
        self._weights = {n: w for w in weights for n in hugging_face_names(w.name)}
        self.names = list(self._weights)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._latest: tuple[str, Tensor] | None = None

    @staticmethod
    def matches(contents: Contents) -> bool:
        return MODERN in contents.metadata or LEGACY in contents.metadata

    def kept(self, name: str) -> Int4 | None:
        weight = self._weights.get(name)
        return self._kept.get(weight.name) if weight is not None else None

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        theirs, self._shapes[name] = their_name(name), shape
        weight = self._weights.get(name)
        if weight is not None:
            theirs = weight.name
        # Of a fused weight, all rows that are known by now; the last of its parts knows them all.
        parts = [self._shapes[n] for n in hugging_face_names(theirs) if n in self._shapes]
        whole = (sum(part[0] for part in parts), *shape[1:])
        if weight is None:
            return {theirs: StoredTensor(DTYPES, whole)}
        if weight.dims not in (None, len(whole)):
            raise HeaderError(theirs, f"is quantized, config.json asks the shape {whole}")
        return {weight.keys[data]: tensor for data, tensor in weight.stored(whole).items()}

    def read(self, name: str, read: Read) -> Tensor:
        weight = self._weights[name]
        parts = hugging_face_names(weight.name)
        if len(parts) == 1:
            return self._whole(weight, self._shapes[name], read)
        rows = [self._shapes[part][0] for part in parts]
        if self._latest is None or self._latest[0] != weight.name:
            shape = (sum(rows), *self._shapes[name][1:])
            self._latest = weight.name, self._whole(weight, shape, read)
        index, whole = parts.index(name), self._latest[1]
        if name == parts[-1]:
            self._latest = None
        return whole.split(rows)[index]

    def _whole(self, weight: Weight, shape: tuple[int, ...], read: Read) -> Tensor:
        kept = self._kept.get(weight.name) is not None
        return weight.read(lambda data: read(weight.keys[data]), shape, kept)


def _packed_experts(name: str, found: Mapping[str, StoredTensor]) -> PackedExperts:
    keys = {"qdata": name, "scale": f"{name}_scale"}
    sizes = [found[key].shape[-1:] or (0,) for key in keys.values() if key in found]
    if len(sizes) < len(keys):
        raise TensorError(name, f"has no {keys['scale']} beside it")
    (values,), (groups,) = sizes
    block = 2 * values // groups if groups else 0
    if block not in ops.GROUP_SIZES or found[keys["scale"]].dtypes[0] not in SCALES:
        problem = f"has {groups} scales a row for {2 * values} columns, and the dtype"
        expected = f"expected groups of {ops.GROUP_SIZES} columns and one of {[*SCALES]}"
        raise TensorError(keys["scale"], f"{problem} {found[keys['scale']].dtypes[0]}; {expected}")
    return PackedExperts(name, keys, block)


def _say_what_is_not_kept(contents: Contents, weights: list[Weight]) -> None:
    if weights:
        warn(
            f"{contents.directory}: {len(weights)} quantized weights, such as {weights[0].name}, "
            "are not symmetric INT4 in groups: they are dequantized, and stored as the flags say"
        )
