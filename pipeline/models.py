"""The models that the pipeline knows by `model_type`, and what it asks of one.

A model is a folder under `examples` with a module `model` that holds `MODEL`. Adding one takes the
folder and a line in `MODELS`; nothing else of the pipeline names a model.
"""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from et_moe.backends.method_graph import HandOver
from et_moe.backends.ops import PAGE_SIZE
from et_moe.pipeline.codes import CODES
from et_moe.pipeline.config import Config, ConfigError, end_of_turn, read_json, warn
from et_moe.pipeline.storage import Precision, Storages

MODELS = {
    "qwen3_5_moe": "et_moe.examples.qwen3_5_moe.model",
    "qwen3_5_moe_text": "et_moe.examples.qwen3_5_moe.model",
    "qwen3_next": "et_moe.examples.qwen3_next.model",
}
"""`model_type` of a config.json -> module whose `MODEL` it is."""

MTP = "mtp."
"""What names of the head for multi-token prediction begin with, in checkpoints (whatever prefix the
others have) and in graphs."""

HEAD = "lm_head."
"""What names of the model's head begin with, in graphs."""

Shapes = dict[str, tuple[int, ...]]
Parts = list[Tensor]
"""Tensors that make up one parameter when concatenated along dimension 0."""


class JoinError(ConfigError):
    """Weights that make up one are stored in different ways; the reader names them."""


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenates weights of a checkpoint that make up one.

    Raises:
        JoinError: some are quantized (codes) and some are not.
    """
    if len({tensor.dtype == CODES for tensor in tensors}) > 1:
        shapes = " and ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
        raise JoinError(f"this weight and its neighbour are not both quantized: {shapes}")
    return torch.cat(tuple(tensors), dim)


class Range(NamedTuple):
    """A size that varies from call to call, from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Sizes:
    """What a program is to take.

    Attributes:
        max_seq_len: most tokens of a sequence, prompt and generated ones together.
        max_prefill_tokens: most tokens of one prefill call, at least 2.
        max_sequences: most sequences of one decode call.
        draft_tokens: of each sequence in a decode call that is fed drafts; 0 for no such methods.
        draft_sequences: most sequences of one decode call that is fed drafts.
        draft_vocabulary: drafts are among so many tokens, the first ones; 0 for all.
        score_tokens: most tokens of one call that returns the logits behind each; 0 for no such
            method, else at least 2.
    """

    max_seq_len: int
    max_prefill_tokens: int
    max_sequences: int
    draft_tokens: int = 0
    draft_sequences: int = 1
    draft_vocabulary: int = 0
    score_tokens: int = 0

    @property
    def max_pages(self) -> int:
        """Pages of the KV cache that the longest sequence takes. A call has drafts behind its last
        token, and makes as many behind the last that may be accepted."""
        return -(-(self.max_seq_len + 2 * self.draft_tokens) // PAGE_SIZE)


class StateTensor(NamedTuple):
    """State of all sequences, `[P, *shape]`: the first dimension is that of a pool, whose size is
    chosen when a program is loaded.

    Attributes:
        pool: one of `method_graph.POOLS`.
        shape: of one page or slot.
    """

    dtype: torch.dtype
    pool: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """A runtime input of a method.

    Attributes:
        name: of the model's argument.
        dtype: of the tensor.
        shape: sizes; one that varies from call to call is a range, and the same one wherever a
            method has this range.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | Range, ...]


@dataclass(frozen=True)
class Method:
    """A method of a program, as a runner sees it.

    Attributes:
        inputs: runtime inputs, in order.
        outputs: names of what it returns, in order.
        hand_over: how its next call follows from what it returns, or None.
        draft_tokens, full_logits: further arguments of the graph's `forward`, where they are not 0
            and not False.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    hand_over: HandOver | None = None
    draft_tokens: int = 0
    full_logits: bool = False


@dataclass(frozen=True)
class Random:
    """How a random checkpoint draws the values of a tensor: normal, or log of uniform numbers.

    Attributes:
        mean, std: of normal values.
        log_uniform: (low, high) of the numbers whose logarithm is taken, in place of the normal.
    """

    mean: float = 0.0
    std: float = 0.02
    log_uniform: tuple[float, float] | None = None


@dataclass(frozen=True)
class PresetFiles:
    """The files of a random checkpoint beside its weights.

    Attributes:
        config: content of config.json. generation: of generation_config.json.
        prefix: in front of the names of all tensors but those of the two heads.
        tokenizer: content of tokenizer.json, or None for none.
    """

    config: dict[str, Any]
    generation: dict[str, Any]
    prefix: str
    tokenizer: dict[str, Any] | None = None


class Graph(nn.Module):
    """The model's graph, made of `torch.ops.et_moe` ops and a few aten ops.

    `forward` takes the inputs of a method by name, and `state`, the tensors of `state_spec`, which
    it updates in place. Parameters of decoder layer i are named `layers.i.…`, those of the MTP head
    `mtp.…`; each of these, those before the first layer, and those behind the last make up a group.
    """

    def state_spec(self, draft_tokens: int = 0) -> dict[str, StateTensor]:
        """Every state tensor by name; a sequence starts with a slot of zeros. With drafts a slot
        has a version behind the token that a call feeds and behind each draft, see
        `backends/ops/sequences.py`: as many rows more in its first dimension."""
        raise NotImplementedError

    def shorten_drafts(self, vocabulary: int) -> None:
        """Has the MTP head draft among so many tokens, the first ones. The weights of the rows that
        it needs then are `pipeline.draft_head`'s."""
        raise NotImplementedError

    def advance(self, group: int, x: Tensor, sequences: int, state: Mapping[str, Tensor]) -> Tensor:
        """Takes whole sequences through one group of parameters, eagerly: the embedding, a layer,
        or the norm and the head.

        Args:
            group: number of the group.
            x: what came out of the group before, `[B R, H]`; of the first one, tokens int64
                `[B, R]`.
            sequences: B, which begin. state: of the group's layer, zeros of `make_state`, with
                the pages and slots of each sequence behind those of the one before.

        Returns:
            `[B R, H]`; of the last group logits float32 `[B R, V]`.
        """
        raise NotImplementedError

    def make_state(
        self,
        pool: Mapping[str, int],
        device: torch.device | None = None,
        draft_tokens: int = 0,
    ) -> dict[str, Tensor]:
        """State of zeros, with so many pages and slots by pool."""
        return {
            name: torch.zeros((pool[given.pool], *given.shape), dtype=given.dtype, device=device)
            for name, given in self.state_spec(draft_tokens).items()
        }


class Model(Protocol):
    """A model family: everything that the pipeline does not know itself.

    Attributes:
        parts: name of each part of the model that has a storage of its own -> what it is:
            "embedding", "linear" or "experts".
        joined: part -> the part into whose tables it goes where both are stored alike.
        presets: name -> text configuration of random checkpoints; `layer_types` may be left out.
        prefixes: that names of tensors may have, the longest first.
        skipped_prefixes: of tensors that are passed over.
    """

    parts: Mapping[str, str]
    joined: Mapping[str, str]
    presets: Mapping[str, dict[str, Any]]
    prefixes: tuple[str, ...]
    skipped_prefixes: tuple[str, ...]

    def parse_config(
        self, config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str
    ) -> Config:
        """The configuration from the content of config.json and generation_config.json."""
        ...

    def checkpoint_shapes(self, config: Any, names: Collection[str] = ()) -> Shapes:
        """Every tensor of an unquantized checkpoint by its name behind the prefix, in the order
        of the model; `names` are those found, which tell how experts are stored."""
        ...

    def part(self, name: str) -> str | None:
        """The part that a weight of a checkpoint belongs to, or None for one that has no storage of
        its own; `name` is one of `checkpoint_shapes`."""
        ...

    def groups(
        self,
        config: Any,
        names: Collection[str],
        read: Callable[[str], Tensor],
        storages: Storages,
    ) -> Iterator[dict[str, Parts]]:
        """The model's parameters group by group: embedding, each layer, norm and head, MTP head;
        those of a graph with these storages.

        What `read` returns may be floats or codes (`pipeline/codes.py`); either is fused and padded
        with zeros by rows and columns, and joined by `join`.
        """
        ...

    def computed(self, config: Any, name: str) -> Tensor | None:
        """The value of a parameter that follows from the configuration alone; None for others."""
        ...

    def build(self, config: Any, precision: Precision) -> Graph:
        """The graph with its parameters, on the current default device; with the MTP head if the
        configuration has one."""
        ...

    def methods(self, config: Any, sizes: Sizes) -> dict[str, Method]:
        """The methods of a program by name."""
        ...

    def random(self, name: str, shape: tuple[int, ...], std: float) -> Random:
        """How a random checkpoint draws a tensor or parameter; `std` of those without a rule."""
        ...

    def preset_files(self, preset: str, text: dict[str, Any]) -> PresetFiles:
        """The files of a random checkpoint with the text configuration `text` of a preset."""
        ...


def model_for(model_type: object, where: str) -> Model:
    """The model of a `model_type`; a ConfigError that names `where` for one that is not known."""
    module = MODELS.get(model_type) if isinstance(model_type, str) else None
    if module is None:
        expected = tuple(MODELS)
        raise ConfigError(f"{where}: model_type is {model_type!r}, expected one of {expected}")
    return importlib.import_module(module).MODEL


def model_of(config: Config) -> Model:
    """The model of a configuration."""
    return model_for(config.model_type, "configuration")


def parse_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config"
) -> Config:
    """Finds the model of a configuration and reads it.

    Args:
        config: content of config.json: of a text model, or of a multimodal one with `text_config`.
        generation: content of generation_config.json; its `eos_token_id` wins.
        where: the configuration's file, for messages.

    Raises:
        ConfigError: names the file, the key, its value and what was expected.
    """
    return model_for(config.get("model_type"), where).parse_config(config, generation, where)


def load_config(directory: Path) -> Config:
    """Reads `config.json`, and `generation_config.json` where there is one, of a checkpoint."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    if generation.get("eos_token_id") == []:
        del generation["eos_token_id"]
    file = directory / "config.json"
    config = parse_config(read_json(file), generation, str(file))
    return config if "eos_token_id" in generation else _with_end_of_turn(directory, config)


def _with_end_of_turn(directory: Path, config: Config) -> Config:
    """A configuration whose checkpoint has no `generation_config.json` that says where a text
    ends: the tokenizer's end of turn counts, too, which a chat model needs."""
    ids = config.eos_token_ids
    end = end_of_turn(directory)
    if end is not None and end < config.vocab_size and end not in ids:
        ids = (*ids, end)
        warn(
            f"{directory}: no generation_config.json says where texts end: token {end}, the "
            "tokenizer's eos_token, is taken, too"
        )
    if not ids:
        warn(f"{directory}: no end-of-sequence id is known: texts end at their limit only")
    return replace(config, eos_token_ids=ids)
