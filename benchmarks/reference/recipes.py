"""The quantizations that are compared: recipes, group sizes, scale methods, and single parts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.storage import Int4, Int8PerRow, Storage, Storages, choose_storages

METHODS = {"mse": ("mse", False), "mse, importance": ("mse", True)}
METHODS |= {"search": ("search", False), "search, importance": ("search", True)}
"""What a table calls it -> scale method, and whether columns are weighed."""

BEST = "search, importance"

PIECES = {
    "experts.gate_up": ("experts.gate_up_proj",),
    "experts.down": ("experts.down_proj",),
    "linear_attention.in": ("linear_attn.in_proj",),
    "linear_attention.out": ("linear_attn.out_proj",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "shared_expert": ("shared_expert.",),
    "head": ("lm_head",),
}
"""What a single part is called -> what names of its weights have in them."""


@dataclass(frozen=True)
class Row:
    """A quantization of the model.

    Attributes:
        name: of the recipe. scales: a key of `METHODS`.
        parts: the storages of the model's parts.
        activations: "int8" or "bf16".
        exceptions: names of weights have this in them -> another storage than their part's, which
            no program has: only the table asks what it would be worth.
    """

    name: str
    scales: str
    parts: Storages
    activations: str = "bf16"
    exceptions: Mapping[str, Storage] = field(default_factory=dict)

    def storage_of(self, weight: str) -> Storage:
        """The storage of a weight by its name in a checkpoint, behind the prefix."""
        found = (storage for inside, storage in self.exceptions.items() if inside in weight)
        return next(found, self.parts[MODEL.part(weight)])


def recipe(name: str, group_size: int = 128, **by_part: str) -> Storages:
    """The storages that the command line's flags choose."""
    return choose_storages(MODEL.parts, recipe=name, group_size=group_size, by_part=by_part)


def rows() -> Iterator[Row]:
    """What the table compares, the most wanted first."""
    for method in METHODS:
        for activations in ("bf16", "int8"):
            yield Row("mixed", method, recipe("mixed"), activations)
            yield Row("4w", method, recipe("4w"), activations)
    yield Row("dense", "mse", recipe("dense"))
    for size in (64, 32):
        for name in ("mixed", "4w"):
            storages, label = recipe(name, size), f"{name}, groups of {size}"
            yield Row(label, "mse", storages)
            yield Row(label, BEST, storages)
            yield Row(label, BEST, storages, "int8")
    for activations in ("bf16", "int8"):
        yield from _between(activations)


def _between(activations: str) -> Iterator[Row]:
    """Recipes between "4w" and "mixed": which parts are worth INT8, or small groups."""
    for size in (128, 64):
        for kept in (
            ("head",),
            ("linear_attention",),
            ("attention",),
            ("shared_expert",),
            ("attention", "linear_attention"),
            ("attention", "linear_attention", "shared_expert"),
            ("attention", "linear_attention", "head"),
        ):
            storages = recipe("4w", size, **dict.fromkeys(kept, "8w"))
            label = f"4w, groups of {size}, INT8: {', '.join(kept)}"
            yield Row(label, BEST, storages, activations)
    everywhere = ("attention", "linear_attention", "shared_expert", "head")
    for size in (64, 32):
        small = {**recipe("4w"), **dict.fromkeys(everywhere, Int4(size))}
        yield Row(f"4w, groups of {size} but for experts", BEST, small, activations)
        for piece in ("gate_up", "down"):
            label = f"mixed, groups of {size} in {piece} of the experts"
            small = {PIECES[f"experts.{piece}"][0]: Int4(size)}
            yield Row(label, BEST, recipe("mixed"), activations, small)


def single_parts() -> Iterator[Row]:
    """One part INT4 with groups of 128, or INT8, and the rest as it is."""
    dense = recipe("dense")
    for scales in ("mse", BEST):
        for name, inside in PIECES.items():
            yield Row(f"{name} INT4", scales, dense, exceptions=dict.fromkeys(inside, Int4()))
    for name, inside in PIECES.items():
        if not name.startswith("experts"):
            eight = dict.fromkeys(inside, Int8PerRow())
            yield Row(f"{name} INT8", "mse", dense, exceptions=eight)
    for name, storage in (("INT8", Int8PerRow()), ("INT4", Int4())):
        yield Row(f"embedding {name}", "mse", dense | {"embedding": storage})
