"""The command line: `et-moe quantize | export | inspect | eval | make-checkpoint`."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from et_moe.pipeline.entry import PATH, console, run

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__
)


class Backend(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class QLinear(StrEnum):
    NONE = "none"
    W4 = "4w"


class QEmbedding(StrEnum):
    NONE = "none"
    W8 = "8w"


class ActivationDtype(StrEnum):
    INT8 = "int8"
    BF16 = "bf16"


class ScaleMethod(StrEnum):
    MSE = "mse"
    MINMAX = "minmax"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


ModelDir = Annotated[Path, typer.Option(help="Hugging Face checkpoint directory.", **PATH)]
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
GroupSize = Annotated[int, typer.Option(help="Weights per INT4 scale: 32, 64 or 128.")]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _check_one(**flags: object) -> None:
    """Refuses all but one of these flags."""
    if sum(value is not None for value in flags.values()) != 1:
        *first, last = flags
        raise typer.BadParameter(f"give exactly one of {', '.join(first)} and {last}")


def _open_checkpoint(model_dir: Path | None, model_id: str | None):
    from et_moe.pipeline.checkpoint import Checkpoint

    if model_dir is None:
        from et_moe.pipeline.hub import download

        model_dir = download(model_id)
    checkpoint = Checkpoint(model_dir)
    if checkpoint.skipped:
        console.print(f"skipped {checkpoint.skipped} tensors that are not used, such as vision's")
    return checkpoint


@app.command()
def quantize(
    output_dir: OutputDir,
    model_dir: ModelDirOrNone = None,
    model_id: ModelId = None,
    qlinear: Annotated[QLinear, typer.Option(help="INT4 linear layers and experts.")] = QLinear.W4,
    qlinear_group_size: GroupSize = 128,
    qembedding: Annotated[QEmbedding, typer.Option(help="INT8 embedding.")] = QEmbedding.W8,
    scale_method: Annotated[
        ScaleMethod, typer.Option(help="INT4 scales: least squared error, or max|w| / 7.")
    ] = ScaleMethod.MSE,
) -> None:
    """Quantizes a checkpoint to a bundle, layer by layer."""
    from et_moe.pipeline.bundle import write_bundle
    from et_moe.pipeline.quantize import QuantizedCheckpoint, count_groups

    _check_one(**{"--model-dir": model_dir, "--model-id": model_id})
    checkpoint = _open_checkpoint(model_dir, model_id)
    storages = _storages(checkpoint.config, qlinear, qlinear_group_size, qembedding)
    source = QuantizedCheckpoint(checkpoint, storages, scale_method.value)
    with _progress() as progress:
        task = progress.add_task("quantizing", total=count_groups(source.config))
        write_bundle(source, output_dir, lambda: progress.advance(task))
    console.print(f"wrote the bundle {output_dir}", soft_wrap=True)


def _storages(config, qlinear, group_size, qembedding):
    """The storage of each part of a model by the flags; None is a flag that was not given."""
    from et_moe.pipeline.models import model_of
    from et_moe.pipeline.storage import choose_storages

    group_size = 128 if group_size is None else group_size
    return choose_storages(
        model_of(config).parts,
        (qlinear or QLinear.W4).value,
        group_size,
        (qembedding or QEmbedding.W8).value,
    )


def _source(model_dir, model_id, prequantized, qlinear, group_size, qembedding):
    """The `WeightSource` that the options of `export` describe."""
    from et_moe.pipeline.bundle import Bundle
    from et_moe.pipeline.quantize import QuantizedCheckpoint

    given = {"--model-dir": model_dir, "--model-id": model_id, "--prequantized": prequantized}
    _check_one(**given)
    if prequantized is None:
        checkpoint = _open_checkpoint(model_dir, model_id)
        storages = _storages(checkpoint.config, qlinear, group_size, qembedding)
        return QuantizedCheckpoint(checkpoint, storages)
    given = {"--qlinear": qlinear, "--qlinear-group-size": group_size, "--qembedding": qembedding}
    for flag, value in given.items():
        if value is not None:
            raise typer.BadParameter(f"{flag} is fixed by the bundle of --prequantized")
    return Bundle(prequantized)


def _preset_model(model_type: str | None, preset: str):
    """The model that `--model-type` names, once it has the preset."""
    from et_moe.pipeline.models import MODELS, model_for

    model = model_for(model_type or next(iter(MODELS)), "--model-type")
    if preset not in model.presets:
        raise typer.BadParameter(f"--preset {preset!r}: expected one of {', '.join(model.presets)}")
    return model


def _preset_source(model_type, preset, qlinear, group_size, qembedding) -> SimpleNamespace:
    """A preset as an `export.Target`: a source without weights."""
    from et_moe.pipeline.make_checkpoint import text_config
    from et_moe.pipeline.models import parse_config

    model = _preset_model(model_type, preset)
    config = parse_config(text_config(model, preset), where=f"preset {preset}")
    storages = _storages(config, qlinear, group_size, qembedding)
    return SimpleNamespace(config=config, storages=storages)


def _cuda_archs(backend: Backend, requested: str | None) -> tuple[str, ...]:
    if backend is not Backend.CUDA:
        if requested is not None:
            raise typer.BadParameter("--cuda-arch needs --backend cuda")
        return ()
    from et_moe.backends.cuda.gpu import default_archs, gpu_for

    archs = default_archs() if requested is None else requested.split(",")
    return tuple(gpu_for(arch.strip()).arch for arch in archs)


@app.command()
def export(
    output_dir: OutputDir,
    model_dir: ModelDirOrNone = None,
    model_id: ModelId = None,
    prequantized: Annotated[Path | None, typer.Option(help="Bundle of `quantize`.", **PATH)] = None,
    preset: Annotated[
        str | None, typer.Option(help="With --graph-only: a shape without weights.")
    ] = None,
    model_type: ModelType = None,
    graph_only: Annotated[
        bool, typer.Option("--graph-only", help="Write model.pte alone, from the configuration.")
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Write model.ptd alone; needs no ExecuTorch.")
    ] = False,
    backend: Annotated[Backend, typer.Option(help="What the program runs on.")] = Backend.CPU,
    cuda_arch: Annotated[
        str | None,
        typer.Option(help="Such as sm_90,sm_80. Default: this machine's GPU, else all known."),
    ] = None,
    qlinear: Annotated[QLinear | None, typer.Option(help="Default 4w.")] = None,
    qlinear_group_size: Annotated[int | None, typer.Option(help="Default 128.")] = None,
    qembedding: Annotated[QEmbedding | None, typer.Option(help="Default 8w.")] = None,
    activation_dtype: Annotated[
        ActivationDtype,
        typer.Option(
            "--activation-dtype",
            "--moe-activation-dtype",
            help="Of the inputs of all INT4 layers, experts and projections alike.",
        ),
    ] = ActivationDtype.INT8,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of activations, caches and unquantized weights. "
            "Default: float32 on a CPU, bfloat16 on CUDA."
        ),
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Context length. Default: the model's, at most 4096.")
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(help="Most sequences of one decode call, at most 256.")
    ] = 64,
    cache: Annotated[bool, typer.Option(help="Keep and reuse compiled CUDA code.")] = True,
    cache_dir: Annotated[Path, typer.Option(help="Where to keep it.", **PATH)] = Path(
        "~/.cache/et-moe/cuda"
    ),
    debug_sidecar: Annotated[
        bool, typer.Option("--debug-sidecar", help="Also write the CUDA kernels' source.")
    ] = False,
) -> None:
    """Exports `model.pte`, `model.ptd` and the tokenizer."""
    if debug_sidecar and backend is not Backend.CUDA:
        raise typer.BadParameter("--debug-sidecar needs --backend cuda")
    if graph_only and weights_only:
        raise typer.BadParameter("--graph-only and --weights-only exclude each other")
    archs = () if weights_only else _cuda_archs(backend, cuda_arch)
    if preset is not None:
        if not graph_only or model_dir or model_id or prequantized:
            raise typer.BadParameter("--preset takes --graph-only and no checkpoint")
        source = _preset_source(model_type, preset, qlinear, qlinear_group_size, qembedding)
    else:
        source = _source(model_dir, model_id, prequantized, qlinear, qlinear_group_size, qembedding)

    from et_moe.pipeline import export as exporter
    from et_moe.pipeline.locks import sole_writer

    dtype = dtype or (Dtype.BFLOAT16 if backend is Backend.CUDA else Dtype.FLOAT32)
    options = exporter.ExportOptions(
        backend.value,
        exporter.DTYPES[dtype.value],
        activation_dtype.value,
        max_seq_len,
        max_sequences,
        archs,
        cache_dir if cache else None,
        debug_sidecar,
    )
    with _progress() as progress:
        task = progress.add_task("exporting", total=source.config.num_hidden_layers + 4)

        def show(stage: str) -> None:
            progress.update(task, advance=1, description=stage)

        if graph_only:
            with sole_writer(output_dir, ["model.pte"]):
                exporter.write_graphs(exporter.lower(source, options), output_dir, options)
        elif weights_only:
            exporter.check_tokenizer(source.directory)
            with sole_writer(output_dir, ["model.ptd"]):
                plan = exporter.plan_weights(source, options)
                exporter.write_weights(source, plan, output_dir, options, show)
        else:
            exporter.export(source, output_dir, options, show)
    console.print(f"wrote {output_dir}", soft_wrap=True)


@app.command()
def make_checkpoint(
    output_dir: Annotated[
        Path,
        typer.Option(
            "--output-dir", "--output", help="Directory to make; must not hold files.", **PATH
        ),
    ],
    preset: Annotated[str, typer.Option(help="Shape: tiny, or one as published (35b).")] = "tiny",
    model_type: ModelType = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the preset has.")] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="With the head for multi-token prediction.")
    ] = False,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Write a bundle, as `quantize` would.")
    ] = False,
) -> None:
    """Writes a random checkpoint in Hugging Face layout, or a random bundle."""
    if quantized:
        from et_moe.pipeline.make_bundle import make_bundle as run
    else:
        from et_moe.pipeline.make_checkpoint import make_checkpoint as run

    overrides = {"mtp_num_hidden_layers": int(mtp)}
    run(output_dir, _preset_model(model_type, preset), preset, seed, layers, overrides)
    console.print(f"wrote {output_dir}", soft_wrap=True)


def _need_standard_output() -> None:
    """For what a command prints at its end: it must not work for nothing."""
    if sys.stdout is None or not sys.stdout.writable():
        raise OSError("standard output is closed")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A `.pte` for CUDA.", **PATH)],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints what a CUDA program holds: methods, code, kernels, state and weights."""
    _need_standard_output()
    from et_moe.backends.cuda.inspect import inspect as run
    from et_moe.backends.cuda.inspect import print_tables

    if file.is_dir():
        raise ValueError(f"{file}: a folder, expected a .pte, such as {file / 'model.pte'}")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: not a regular file, expected a .pte")
    try:
        description = run(file.read_bytes())
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e
    if json_output:
        print(json.dumps(description, indent=1))
    else:
        print_tables(description)


@app.command(name="eval")
def evaluate(
    model_dir: ModelDir,
    program_dir: Annotated[Path, typer.Option(help="Output directory of `export`.", **PATH)],
    text: Annotated[Path, typer.Option(help="Held-out text, UTF-8.", **PATH)],
    runner: Annotated[Path, typer.Option(help="The runner's binary.", **PATH)] = Path(
        "build/runner/qwen3_5_moe_runner"
    ),
    window: Annotated[int, typer.Option(help="Tokens scored together.")] = 512,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compares an exported model with the Hugging Face model on a text."""
    _need_standard_output()
    from et_moe.pipeline.evaluate import evaluate as run

    with _progress() as progress:
        task = progress.add_task("windows", total=None)
        result = run(
            model_dir,
            program_dir,
            text,
            runner,
            window,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(result.to_json() if json_output else result.to_table())


def main() -> None:
    """Entry point of `python -m et_moe.pipeline.cli`."""
    run(app)


if __name__ == "__main__":
    main()
