"""Measures which columns of a checkpoint's weights matter, one layer in memory at a time.

A text goes through the model as it is, all of it through one layer after the other. In front of
each matrix the squares of its inputs are summed by column; experts sum those of the tokens that are
sent to them. The ops' eager references compute, in fp32, on a GPU if there is one.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from et_moe.backends.method_graph import PAGES, SLOTS
from et_moe.backends.ops import PAGE_SIZE, rms_norm
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError, read_text
from et_moe.pipeline.importance import ROWS, Moments, important
from et_moe.pipeline.layers import Experts, Linear, StoredModule, stored_weights
from et_moe.pipeline.models import MTP, Graph, model_of
from et_moe.pipeline.quantize import QuantizedCheckpoint, meta_graph
from et_moe.pipeline.storage import Dense, Precision, Storage

WINDOW, MOST_WINDOWS = 512, 64
"""Tokens that are seen together, and windows that are taken of a text, evenly spaced."""

AT_ONCE = 8
"""Windows that are computed together."""

HEAD_ROWS = 256
"""Rows of logits in memory."""


class _Apart(Dense):
    """Of a part that is not to be joined with another, which is `Dense`."""


def read_windows(text: Path, checkpoint: Checkpoint) -> Tensor:
    """Windows of a text, int64 `[windows, tokens]`.

    Raises:
        ConfigError: there is no text or no tokenizer, or the one has tokens that the model lacks.
    """
    path, config = checkpoint.directory / "tokenizer.json", checkpoint.config
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing more special
        raise ConfigError(f"{path}: cannot be read as a tokenizer ({e})") from None
    ids = torch.tensor(tokenizer.encode(read_text(text)).ids, dtype=torch.int64)
    length = min(WINDOW, len(ids), config.max_position_embeddings)
    if length < 2:
        raise ConfigError(f"{text}: holds fewer than two tokens")
    if ids.max() >= config.vocab_size:
        what = f"token {int(ids.max())}, the model has {config.vocab_size}"
        raise ConfigError(f"{path}: gives {what}")
    windows = ids[: len(ids) // length * length].view(-1, length)
    count = min(len(windows), MOST_WINDOWS)
    return windows[torch.arange(count) * len(windows) // count]


class _Observer:
    """Sums over the inputs of the matrices of modules that belong to one group.

    Attributes:
        moments: of each weight by its name in the graph.
    """

    def __init__(self, graph: Graph, names: Mapping[str, Tensor], device: torch.device) -> None:
        self.moments: dict[str, Moments] = {}
        self._undo: list[Callable[[], None]] = []
        for name, module in graph.named_modules():
            if isinstance(module, StoredModule) and any(n.startswith(f"{name}.") for n in names):
                self._observe(name, module, device)

    def _observe(self, name: str, module: StoredModule, device: torch.device) -> None:
        for weight, (*experts, _, columns) in module.shapes.items():
            made = Moments.zeros(*experts, columns, device=device)
            self.moments[f"{name}.{weight}"] = made
        if isinstance(module, Linear):
            hook = functools.partial(self._linear, self.moments[f"{name}.weight"])
        elif isinstance(module, Experts):
            tables = (self.moments[f"{name}.{weight}"] for weight in ("w13", "w2"))
            hook = functools.partial(self._experts, *tables)
        else:
            del self.moments[f"{name}.weight"]
            return
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def end(self) -> None:
        """Lets the modules go."""
        for undo in self._undo:
            undo()

    @staticmethod
    def _linear(moments: Moments, module: Linear, given: tuple, named: dict) -> None:
        def inputs(x: Tensor, norm: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
            return x if norm is None else rms_norm(x, norm, module.eps)

        moments.add(inputs(*given, **named))

    @staticmethod
    def _experts(outer: Moments, inner: Moments, module: Experts, given: tuple, _: dict) -> None:
        x, _, ids, *_ = given
        for expert, table in enumerate(module.w13):
            rows = x[(ids == expert).any(-1)]
            gate, up = (rows.float() @ table.float().T).chunk(2, dim=-1)
            outer.add(rows, expert)
            inner.add(nn.functional.silu(gate) * up, expert)


class Calibration:
    """A text on its way through a checkpoint.

    Raises:
        ConfigError: a part of the checkpoint arrives quantized.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        if checkpoint.kept:
            part = next(iter(checkpoint.kept))
            where = f"{checkpoint.directory}: {part} arrives quantized"
            raise ConfigError(f"{where} and keeps its scales: nothing is to be calibrated")
        model = model_of(checkpoint.config)
        self._storages: dict[str, Storage] = {
            part: _Apart() if part in model.joined else Dense() for part in model.parts
        }
        self._checkpoint, self._windows = checkpoint, windows
        self._source = QuantizedCheckpoint(checkpoint, self._storages)
        precision = Precision(self._storages, dtype=torch.float32)
        self._graph = meta_graph(self._source.config, precision)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def run(self, progress: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """The content of a file of importance; `progress` is called behind each group."""
        found: dict[str, Tensor] = {}
        hidden = list(self._windows.split(AT_ONCE))
        tags = self._tags()
        for number, group in enumerate(self._source.groups()):
            if not any(name.startswith(MTP) for name in group):
                moments = self._through(number, group, hidden)
                found |= self._by_weight(moments, next(tags))
            progress()
        return {name: tensor.cpu() for name, tensor in found.items()}

    def _through(
        self, number: int, group: dict[str, Tensor], hidden: list[Tensor]
    ) -> dict[str, Moments]:
        """Advances the hidden states of all windows by one group of parameters."""
        kept, stored = dict(self._graph.named_parameters()), stored_weights(self._graph)
        loaded = {
            name: tensor.to(self._device, None if name in stored else kept[name].dtype)
            for name, tensor in group.items()
        }
        self._graph.load_state_dict(loaded, strict=False, assign=True)
        observer = _Observer(self._graph, group, self._device)
        for index, windows in enumerate(self._windows.split(AT_ONCE)):
            x, count = hidden[index].to(self._device), len(windows)
            if number <= self._source.config.num_hidden_layers:
                state = self._state(group, count)
                hidden[index] = self._graph.advance(number, x, count, state).float()
            else:  # logits take much memory, and nothing comes behind them
                for rows in x.split(HEAD_ROWS):
                    self._graph.advance(number, rows, 1, {})
        observer.end()
        released = {name: kept[name] for name in group}
        self._graph.load_state_dict(released, strict=False, assign=True)
        return observer.moments

    def _state(self, group: Mapping[str, Tensor], sequences: int) -> dict[str, Tensor]:
        """State of zeros for the layer that a group is."""
        prefix = ".".join(next(iter(group)).split(".")[:2]) + "."
        pages = sequences * -(-self._windows.shape[1] // PAGE_SIZE)
        pool = {PAGES: pages, SLOTS: sequences}
        return {
            name: torch.zeros((pool[s.pool], *s.shape), dtype=s.dtype, device=self._device)
            for name, s in self._graph.state_spec().items()
            if name.startswith(prefix)
        }

    def _tags(self) -> Iterator[dict[str, Tensor]]:
        """Of each group, which weight of the checkpoint each row of a parameter comes from: its
        index among the weights, int32 `[..., N, 1]`."""
        shapes = self._checkpoint.shapes()
        numbers = {name: index for index, name in enumerate(shapes)}

        def tag(name: str) -> Tensor:
            sizes = (*shapes[name][:-1], 1) if not name.startswith(MTP) else shapes[name]
            return torch.tensor(numbers[name], dtype=torch.int32).expand(sizes)

        for group in self._checkpoint.groups_of(tag, self._storages):
            yield {name: torch.cat(parts) for name, parts in group.items()}

    def _by_weight(
        self, moments: Mapping[str, Moments], tags: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Means and numbers of rows by the names of the checkpoint's weights."""
        found: dict[str, Tensor] = {}
        names, shapes = list(self._checkpoint.shapes()), important(self._checkpoint)
        for parameter, sums in moments.items():
            mean = sums.mean()
            for index in tags[parameter].unique().tolist():
                name, here = names[index], (tags[parameter] == index).flatten(-2).any(-1)
                whole = len(shapes[name]) == mean.dim()
                found[name] = mean if whole else mean[here].squeeze(0)
                found[name + ROWS] = sums.rows if whole else sums.rows[here].squeeze(0)
        return found
