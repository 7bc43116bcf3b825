"""The command line: `et-moe quantize | export | eval | make-checkpoint`."""

import logging
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__
)
console = Console(stderr=True)


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


class Preset(StrEnum):
    TINY = "tiny"
    FULL = "35b"


ModelDir = Annotated[Path, typer.Option(help="Hugging Face checkpoint directory.")]
OutputDir = Annotated[Path, typer.Option(help="Directory to write; created if need be.")]
GroupSize = Annotated[int, typer.Option(help="Weights per INT4 scale: 32, 64 or 128.")]


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _open_checkpoint(model_dir: Path):
    from et_moe.examples.qwen3_5_moe.checkpoint import Checkpoint

    checkpoint = Checkpoint(model_dir)
    if checkpoint.skipped:
        console.print(f"skipped {checkpoint.skipped} vision and MTP tensors")
    return checkpoint


@app.command()
def quantize(
    model_dir: ModelDir,
    output_dir: OutputDir,
    qlinear: Annotated[QLinear, typer.Option(help="INT4 linear layers and experts.")] = QLinear.W4,
    qlinear_group_size: GroupSize = 128,
    qembedding: Annotated[QEmbedding, typer.Option(help="INT8 embedding.")] = QEmbedding.W8,
    scale_method: Annotated[
        ScaleMethod, typer.Option(help="INT4 scales: least squared error, or max|w| / 7.")
    ] = ScaleMethod.MSE,
) -> None:
    """Quantizes a checkpoint to a bundle, one layer in memory."""
    from et_moe.examples.qwen3_5_moe.bundle import QuantizedCheckpoint, write_bundle
    from et_moe.examples.qwen3_5_moe.model import Quantization

    checkpoint = _open_checkpoint(model_dir)
    quantization = Quantization(qlinear.value, qlinear_group_size, qembedding.value)
    source = QuantizedCheckpoint(checkpoint, quantization, scale_method.value)
    with _progress() as progress:
        task = progress.add_task("quantizing", total=source.config.num_hidden_layers + 2)
        write_bundle(source, output_dir, lambda: progress.advance(task))
    console.print(f"wrote the bundle {output_dir}")


def _source(model_dir, prequantized, qlinear, group_size, qembedding, activations):
    """The `WeightSource` that the options of `export` describe."""
    from dataclasses import replace

    from et_moe.examples.qwen3_5_moe.bundle import Bundle, QuantizedCheckpoint
    from et_moe.examples.qwen3_5_moe.model import Quantization

    if (model_dir is None) == (prequantized is None):
        raise typer.BadParameter("give exactly one of --model-dir and --prequantized")
    if prequantized is not None:
        given = {
            "--qlinear": qlinear,
            "--qlinear-group-size": group_size,
            "--qembedding": qembedding,
        }
        for flag, value in given.items():
            if value is not None:
                raise typer.BadParameter(f"{flag} is fixed by the bundle of --prequantized")
        bundle = Bundle(prequantized)
        bundle.quantization = replace(bundle.quantization, moe_activation_dtype=activations.value)
        return bundle
    quantization = Quantization(
        (qlinear or QLinear.W4).value,
        group_size or 128,
        (qembedding or QEmbedding.W8).value,
        activations.value,
    )
    return QuantizedCheckpoint(_open_checkpoint(model_dir), quantization)


@app.command()
def export(
    output_dir: OutputDir,
    model_dir: Annotated[Path | None, typer.Option(help="Hugging Face checkpoint.")] = None,
    prequantized: Annotated[Path | None, typer.Option(help="Bundle of `quantize`.")] = None,
    backend: Annotated[Backend, typer.Option(help="What the program runs on.")] = Backend.CPU,
    qlinear: Annotated[QLinear | None, typer.Option(help="Default 4w.")] = None,
    qlinear_group_size: Annotated[int | None, typer.Option(help="Default 128.")] = None,
    qembedding: Annotated[QEmbedding | None, typer.Option(help="Default 8w.")] = None,
    moe_activation_dtype: Annotated[
        ActivationDtype, typer.Option(help="Of the inputs of INT4 layers.")
    ] = ActivationDtype.INT8,
    dtype: Annotated[
        Dtype, typer.Option(help="Of activations, caches and weights left unquantized.")
    ] = Dtype.FLOAT32,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Context length. Default: the model's, at most 4096.")
    ] = None,
) -> None:
    """Exports `model.pte`, `model.ptd` and the tokenizer."""
    if backend is Backend.CUDA:
        raise typer.BadParameter("--backend cuda is not there yet; use --backend cpu")
    source = _source(
        model_dir, prequantized, qlinear, qlinear_group_size, qembedding, moe_activation_dtype
    )
    from et_moe.examples.qwen3_5_moe.export import DTYPES
    from et_moe.examples.qwen3_5_moe.export import export as run_export

    with _progress() as progress:
        task = progress.add_task("exporting", total=source.config.num_hidden_layers + 5)

        def show(stage: str) -> None:
            progress.update(task, advance=1, description=stage)

        run_export(source, output_dir, DTYPES[dtype.value], max_seq_len, show)
    console.print(f"wrote {output_dir}/model.pte and model.ptd")


@app.command()
def make_checkpoint(
    output: OutputDir,
    preset: Annotated[Preset, typer.Option(help="Shape: tiny, or 35b as published.")] = Preset.TINY,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the preset has.")] = None,
) -> None:
    """Writes a random checkpoint in Hugging Face layout."""
    from et_moe.examples.qwen3_5_moe.make_checkpoint import make_checkpoint as run

    run(output, preset.value, seed, layers)
    console.print(f"wrote {output}")


@app.command(name="eval")
def evaluate(
    model_dir: ModelDir,
    program_dir: Annotated[Path, typer.Option(help="Output directory of `export`.")],
    text: Annotated[Path, typer.Option(help="Held-out text, UTF-8.")],
    runner: Annotated[Path, typer.Option(help="The runner's binary.")] = Path(
        "build/runner/qwen3_5_moe_runner"
    ),
    window: Annotated[int, typer.Option(help="Tokens scored together.")] = 512,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compares an exported model with the Hugging Face model on a text."""
    from et_moe.examples.qwen3_5_moe.evaluate import evaluate as run

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
    """Entry point: a bad input ends with one line on stderr and exit code 1."""
    # ExecuTorch imports torchao, which reports the GPU libraries it does without.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
