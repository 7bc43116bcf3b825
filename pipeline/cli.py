"""The command line: `et-moe calibrate | quantize | export | inspect | eval | make-checkpoint`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from et_moe.pipeline.entry import PATH, console, run
from et_moe.pipeline.options import (
    ActivationDtype,
    Backend,
    Dtype,
    ModelDirOrNone,
    ModelId,
    ModelType,
    OutputDir,
    Recipe,
    ScaleMethod,
    StorageFlags,
    check_one,
    cuda_archs,
    open_checkpoint,
    preset_model,
    preset_source,
    source_of,
    takes_storage_flags,
)

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, help=__doc__)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


@app.command()
@takes_storage_flags
def quantize(
    output_dir: OutputDir,
    model_dir: ModelDirOrNone = None,
    model_id: ModelId = None,
    *,
    flags: StorageFlags,
    scale_method: Annotated[
        ScaleMethod | None,
        typer.Option(
            help="INT4 scales: of least squared error (mse; search: among more candidates), or "
            "max|w| / 7 (minmax). Default: search with --importance, else mse."
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(help="File of `calibrate`: errors count where inputs are large.", **PATH),
    ] = None,
) -> None:
    """Quantizes a checkpoint to a bundle, layer by layer."""
    from et_moe.pipeline.bundle import write_bundle
    from et_moe.pipeline.footprint import footprint
    from et_moe.pipeline.importance import Importance
    from et_moe.pipeline.quantize import QuantizedCheckpoint, count_groups, meta_graph
    from et_moe.pipeline.storage import Precision

    check_one(**{"--model-dir": model_dir, "--model-id": model_id})
    checkpoint = open_checkpoint(model_dir, model_id)
    storages = flags.storages(checkpoint.config)
    if importance is not None and scale_method == ScaleMethod.MINMAX:
        raise typer.BadParameter("--scale-method minmax takes no --importance: mse or search")
    columns = None if importance is None else Importance(importance, checkpoint)
    method = scale_method or (ScaleMethod.MSE if columns is None else ScaleMethod.SEARCH)
    source = QuantizedCheckpoint(checkpoint, storages, method.value, columns)
    with _progress() as progress:
        task = progress.add_task("quantizing", total=count_groups(source.config))
        write_bundle(source, output_dir, lambda: progress.advance(task))
    console.print(f"wrote the bundle {output_dir}", soft_wrap=True)
    taken = footprint(meta_graph(source.config, Precision(source.storages)))
    console.print(str(taken), highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option(help="File to write, for --importance.", **PATH)],
    text: Annotated[Path, typer.Option(help="Text such as the model is to see, UTF-8.", **PATH)],
    model_dir: ModelDirOrNone = None,
    model_id: ModelId = None,
) -> None:
    """Measures which columns of a checkpoint's weights matter, layer by layer."""
    from et_moe.backends.atomic_file import check_writable
    from et_moe.pipeline.calibrate import Calibration, read_windows
    from et_moe.pipeline.importance import write_importance
    from et_moe.pipeline.quantize import count_groups

    check_one(**{"--model-dir": model_dir, "--model-id": model_id})
    check_writable(output)
    checkpoint = open_checkpoint(model_dir, model_id)
    windows = read_windows(text, checkpoint)
    calibration = Calibration(checkpoint, windows)
    with _progress() as progress:
        task = progress.add_task("calibrating", total=count_groups(checkpoint.config))
        found = calibration.run(lambda: progress.advance(task))
    write_importance(output, found)
    console.print(f"wrote {output}, of {windows.numel()} tokens", soft_wrap=True)


@app.command()
@takes_storage_flags
def export(
    output_dir: OutputDir,
    model_dir: ModelDirOrNone = None,
    model_id: ModelId = None,
    *,
    flags: StorageFlags,
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
    activation_dtype: Annotated[
        ActivationDtype,
        typer.Option(
            "--activation-dtype",
            "--moe-activation-dtype",
            help="Of the inputs of all quantized layers, experts and projections alike.",
        ),
    ] = ActivationDtype.INT8,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of activations, caches and unquantized weights. "
            "Default: float32 on a CPU, bfloat16 on CUDA."
        ),
    ] = None,
    recurrent_state_dtype: Annotated[
        Dtype,
        typer.Option(
            help="Of the recurrent state of linear attention (vLLM's --mamba-ssm-cache-dtype). "
            "bfloat16 halves a sequence's state, which is most of what large batches read."
        ),
    ] = Dtype.FLOAT32,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Context length. Default: the model's, at most 4096.")
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(help="Most sequences of one decode call, at most 256.")
    ] = 64,
    draft_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens that the head for multi-token prediction guesses for each step, 0 to 3."
        ),
    ] = 0,
    draft_vocabulary: Annotated[
        int,
        typer.Option(
            help="Guess among so many tokens only, the first, which is faster; 0 for all."
        ),
    ] = 0,
    score: Annotated[
        bool,
        typer.Option(
            "--score",
            help="With a method for the log-probabilities of given texts, 64 tokens a call instead "
            "of one: for `eval` and for completions with echo and logprobs. The program is larger.",
        ),
    ] = False,
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
    archs = () if weights_only else cuda_archs(backend, cuda_arch)
    if preset is not None:
        if not graph_only or model_dir or model_id or prequantized:
            raise typer.BadParameter("--preset takes --graph-only and no checkpoint")
        source = preset_source(model_type, preset, flags, draft_tokens > 0)
    else:
        source = source_of(model_dir, model_id, prequantized, flags)

    from et_moe.pipeline import export as exporter

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
        draft_tokens,
        draft_vocabulary,
        score,
        exporter.DTYPES[recurrent_state_dtype.value],
    )
    writing = exporter.output_folder(
        source, output_dir, options, graph=not weights_only, weights=not graph_only
    )
    with writing, _progress() as progress:
        task = progress.add_task("exporting", total=source.config.num_hidden_layers + 4)

        def show(stage: str) -> None:
            progress.update(task, advance=1, description=stage)

        if graph_only:
            exporter.write_graphs(exporter.lower(source, options), output_dir, options)
        elif weights_only:
            plan = exporter.plan_weights(source, options)
            exporter.write_weights(source, plan, output_dir, options, show)
        else:
            exporter.write_program(source, output_dir, options, show)
    console.print(f"wrote {output_dir}", soft_wrap=True)
    taken = exporter.program_footprint(source, options)
    console.print(str(taken), highlight=False, soft_wrap=True)


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
    recipe: Annotated[
        Recipe | None, typer.Option(help="Of the bundle of --quantized. Default: mixed.")
    ] = None,
) -> None:
    """Writes a random checkpoint in Hugging Face layout, or a random bundle."""
    model = preset_model(model_type, preset)
    overrides = {"mtp_num_hidden_layers": int(mtp)}
    if quantized:
        from et_moe.pipeline.make_bundle import make_bundle
        from et_moe.pipeline.storage import DEFAULT_RECIPE

        stored = recipe.value if recipe else DEFAULT_RECIPE
        make_bundle(output_dir, model, preset, seed, layers, stored, overrides)
    elif recipe is not None:
        raise typer.BadParameter("--recipe needs --quantized")
    else:
        from et_moe.pipeline.make_checkpoint import make_checkpoint as run

        run(output_dir, model, preset, seed, layers, overrides)
    console.print(f"wrote {output_dir}", soft_wrap=True)


def _need_standard_output() -> None:
    """For what a command prints at its end: it must not work for nothing."""
    if sys.stdout is None or not sys.stdout.writable():
        raise OSError("standard output is closed")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A `.pte`, for the CPU or CUDA.", **PATH)],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints what a program holds: methods, kernels, state and weights, bits a weight and bytes a
    decoded token."""
    _need_standard_output()
    from et_moe.pipeline.inspect import inspect as run
    from et_moe.pipeline.inspect import print_description

    if file.is_dir():
        inside = file / "model.pte"
        hint = f"such as {inside}" if inside.exists() else "and the folder has no model.pte"
        raise ValueError(f"{file}: a folder, expected a .pte, {hint}")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: not a regular file, expected a .pte")
    try:
        description = run(file.read_bytes())
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e
    print_description(description, json_output)


@app.command(name="eval")
def evaluate(
    program_dir: Annotated[Path, typer.Option(help="Output directory of `export`.", **PATH)],
    text: Annotated[Path, typer.Option(help="Held-out text, UTF-8.", **PATH)],
    model_dir: ModelDirOrNone = None,
    reference_program: Annotated[
        Path | None,
        typer.Option(help="Output directory of another `export`, to compare with.", **PATH),
    ] = None,
    runner: Annotated[Path, typer.Option(help="The runner's binary.", **PATH)] = Path(
        "build/runner/qwen3_5_moe_runner"
    ),
    window: Annotated[
        int,
        typer.Option(
            help="Tokens scored together, at most one more than --max-seq-len of `export`."
        ),
    ] = 512,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measures an exported model on a text: perplexity, as llama.cpp has it, too; and how far it is
    from the Hugging Face model of --model-dir, or from --reference-program. With `export --score`
    it takes less time."""
    _need_standard_output()
    from et_moe.pipeline.evaluate import evaluate as run

    with _progress() as progress:
        task = progress.add_task("tokens", total=None)
        result = run(
            program_dir,
            text,
            runner,
            window,
            model_dir,
            reference_program,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(result.to_json() if json_output else result.to_table())


def main() -> None:
    """Entry point of `python -m et_moe.pipeline.cli`."""
    run(app)


if __name__ == "__main__":
    main()
