"""Options of the command line that several commands have, and what they stand for.

What takes long to import is imported where it is used: `--help` has to be quick.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from et_moe.pipeline.entry import PATH, console


class Backend(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Recipe(StrEnum):
    W4 = "4w"
    MIXED = "mixed"
    DENSE = "dense"


class QWeight(StrEnum):
    W4 = "4w"
    W8 = "8w"
    NONE = "none"


class ActivationDtype(StrEnum):
    INT8 = "int8"
    BF16 = "bf16"


class ScaleMethod(StrEnum):
    MSE = "mse"
    SEARCH = "search"
    MINMAX = "minmax"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def _part(what: str) -> object:
    text = f"{what}, in place of the recipe's and of --qlinear."
    return Annotated[QWeight | None, typer.Option(help=text)]


ModelDirOrNone = Annotated[
    Path | None, typer.Option(help="Hugging Face checkpoint directory.", show_default=False, **PATH)
]
ModelId = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint on the Hugging Face hub, ORG/NAME; what is read of it is downloaded.",
        show_default=False,
    ),
]
OutputDir = Annotated[Path, typer.Option(help="Directory to write; created if need be.", **PATH)]
ModelType = Annotated[
    str | None,
    typer.Option(help="Family of the preset, as in config.json. Default: the first known."),
]
STORAGE_OPTIONS = {
    "recipe": Annotated[
        Recipe | None,
        typer.Option(
            help="4w: all INT4. mixed: experts INT4, what is read for every token INT8 by row. "
            "dense: all as it is. The embedding is INT8 by row but for dense. Default: mixed."
        ),
    ],
    "qlinear": Annotated[
        QWeight | None,
        typer.Option(help="All linear layers and experts, in place of the recipe's."),
    ],
    "qlinear_group_size": Annotated[
        int | None, typer.Option(help="Weights per INT4 scale: 32, 64 or 128. Default: 128.")
    ],
    "qembedding": Annotated[
        QWeight | None, typer.Option(help="Embedding, in place of the recipe's.")
    ],
    "qexperts": _part("Routed experts"),
    "qattention": _part("Projections of attention"),
    "qlinear_attention": _part("Projections of linear attention"),
    "qshared_expert": _part("Shared expert"),
    "qhead": _part("Head"),
}
"""Parameter of a command -> its option; those behind `qembedding` are of single parts."""


def check_one(**flags: object) -> None:
    """Refuses all but one of these flags."""
    if sum(value is not None for value in flags.values()) != 1:
        *first, last = flags
        raise typer.BadParameter(f"give exactly one of {', '.join(first)} and {last}")


class StorageFlags:
    """How the parts of a model are to be stored.

    Args:
        given: values of `STORAGE_OPTIONS`; None is an option that was not given.
    """

    def __init__(self, given: Mapping[str, StrEnum | int | None]) -> None:
        self._given = {
            name: value.value if isinstance(value, StrEnum) else value
            for name, value in given.items()
            if value is not None
        }

    def names(self) -> list[str]:
        """The flags that were given."""
        return [f"--{name.replace('_', '-')}" for name in self._given]

    def storages(self, config):
        """The storage of each part of the model of a configuration."""
        from et_moe.pipeline.models import model_of
        from et_moe.pipeline.storage import DEFAULT_RECIPE, choose_storages

        values = {"recipe": DEFAULT_RECIPE, **self._given}
        general = {
            parameter: values.pop(name)
            for name, parameter in (
                ("recipe", "recipe"),
                ("qlinear", "qlinear"),
                ("qlinear_group_size", "group_size"),
                ("qembedding", "qembedding"),
            )
            if name in values
        }
        by_part = {name.removeprefix("q"): value for name, value in values.items()}
        return choose_storages(model_of(config).parts, **general, by_part=by_part)


def takes_storage_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `STORAGE_OPTIONS` in place of its parameter `flags`."""

    @functools.wraps(command)
    def wrapper(**given) -> None:
        flags = StorageFlags({name: given.pop(name) for name in STORAGE_OPTIONS})
        command(flags=flags, **given)

    own = inspect.signature(command, eval_str=True).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = []
    for name, parameter in own.items():
        if name != "flags":
            parameters.append(parameter.replace(kind=kind))
            continue
        for option, annotation in STORAGE_OPTIONS.items():
            parameters.append(inspect.Parameter(option, kind, default=None, annotation=annotation))
    wrapper.__signature__ = inspect.Signature(parameters)
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def open_checkpoint(model_dir: Path | None, model_id: str | None):
    """The `Checkpoint` of a folder, or of the hub."""
    from et_moe.pipeline.checkpoint import Checkpoint

    if model_dir is None:
        from et_moe.pipeline.hub import download

        model_dir = download(model_id)
    checkpoint = Checkpoint(model_dir)
    if checkpoint.skipped:
        console.print(f"skipped {checkpoint.skipped} tensors that are not used, such as vision's")
    return checkpoint


def source_of(model_dir, model_id, prequantized, flags: StorageFlags):
    """The `WeightSource` that the options of `export` describe."""
    from et_moe.pipeline.bundle import Bundle
    from et_moe.pipeline.quantize import QuantizedCheckpoint

    given = {"--model-dir": model_dir, "--model-id": model_id, "--prequantized": prequantized}
    check_one(**given)
    if prequantized is None:
        checkpoint = open_checkpoint(model_dir, model_id)
        return QuantizedCheckpoint(checkpoint, flags.storages(checkpoint.config))
    for flag in flags.names():
        raise typer.BadParameter(f"{flag} is fixed by the bundle of --prequantized")
    return Bundle(prequantized)


def preset_model(model_type: str | None, preset: str):
    """The model that `--model-type` names, once it has the preset."""
    from et_moe.pipeline.models import MODELS, model_for

    model = model_for(model_type or next(iter(MODELS)), "--model-type")
    if preset not in model.presets:
        raise typer.BadParameter(f"--preset {preset!r}: expected one of {', '.join(model.presets)}")
    return model


def preset_source(
    model_type: str | None, preset: str, flags: StorageFlags, mtp: bool = False
) -> SimpleNamespace:
    """A preset as an `export.Target`: a source without weights. mtp: with the head for multi-token
    prediction, which the published models have."""
    from et_moe.pipeline.make_checkpoint import text_config
    from et_moe.pipeline.models import parse_config

    model = preset_model(model_type, preset)
    overrides = {"mtp_num_hidden_layers": 1} if mtp else {}
    config = parse_config(text_config(model, preset, None, overrides), where=f"preset {preset}")
    return SimpleNamespace(config=config, storages=flags.storages(config))


def cuda_archs(backend: Backend, requested: str | None) -> tuple[str, ...]:
    """The architectures to compile for."""
    if backend is not Backend.CUDA:
        if requested is not None:
            raise typer.BadParameter("--cuda-arch needs --backend cuda")
        return ()
    from et_moe.backends.cuda.gpu import default_archs, gpu_for

    archs = default_archs() if requested is None else requested.split(",")
    return tuple(gpu_for(arch.strip()).arch for arch in archs)
