"""What measures the project, and what checks its machine code.

Results are JSON files; `report` makes docs/results.md of them.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from et_moe.backends.atomic_file import check_writable
from et_moe.benchmarks.result import REPO, RUNNER
from et_moe.pipeline.entry import PATH, invoke, show_error

# Modules that measure are imported where they are used: torch and Triton take seconds.
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, help=__doc__)
RESULTS = Path("build/results")


LOADS = ("8:1700:600", "64:1700:600", "256:1700:600", "256:1000:2000", "64:2000:512:256")
"""Of `batch`. In the last one prompts keep arriving while others decode."""


def _writable(path: Path | None) -> Path | None:
    """Tries an output before hours of measuring; its folder is made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    return path


Out = Annotated[Path, typer.Option(help="JSON file to write.", callback=_writable, **PATH)]
Prompts = Annotated[str, typer.Option(help="Lengths of the prompts in tokens, by commas.")]
NewTokens = Annotated[int, typer.Option(help="Tokens generated after a prompt.", min=2)]
ModelDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the model's config.json; by default the 35B shape.", **PATH),
]


def _numbers(text: str, option: str) -> list[int]:
    """The numbers in a list by commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: expected numbers, by commas") from None


@app.command()
def kernels(
    out: Out = RESULTS / "kernels.json",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, by commas.")] = (
        "1,2,4,8,16,32,64,128,256,512,1024,1600,2048,4095"
    ),
    only: Annotated[str, typer.Option(help="Only subjects whose name contains this.")] = "",
    seconds: Annotated[float, typer.Option(help="Stop measuring after this time.")] = 1e9,
) -> None:
    """Time every kernel against those of the ExecuTorch wheel and the GPU's roof."""
    from et_moe.benchmarks.kernels import measure

    measure(out, _numbers(tokens, "--tokens"), only, seconds)


@app.command()
def e2e(
    program: Annotated[list[str], typer.Option(help="int8=DIR or bf16=DIR; repeatable.")],
    out: Out = RESULTS / "e2e.json",
    prompts: Prompts = "128,512,1600,4096",
    new_tokens: NewTokens = 512,
    warmup: Annotated[int, typer.Option(help="Runs before those that count.", min=1)] = 2,
    num_iters: Annotated[int, typer.Option(help="Runs that count.", min=1)] = 5,
    profile_prompt: Annotated[int, typer.Option(help="Length of the profiled prompt.")] = 1600,
    model_dir: ModelDir = None,
    runner: Annotated[Path, typer.Option(help="The runner's binary.", **PATH)] = RUNNER,
) -> None:
    """Time exported programs through the runner: prefill, decode, first token, memory."""
    from et_moe.benchmarks.e2e import Program, Runner, measure
    from et_moe.benchmarks.shape import model_shape

    programs = [Program.parse(text) for text in program]
    lengths, c = _numbers(prompts, "--prompts"), model_shape(model_dir)
    driver = Runner(runner, warmup, num_iters, c.vocab_size)
    succeeded = measure(driver, programs, lengths, new_tokens, profile_prompt, c, out)
    raise typer.Exit(not succeeded)


@app.command()
def batch(
    program: Annotated[Path, typer.Option(help="Folder of a CUDA program.", **PATH)],
    out: Out = RESULTS / "batch.json",
    load: Annotated[
        list[str], typer.Option(help="SEQUENCES:PROMPT:NEW_TOKENS[:REQUESTS]; repeatable.")
    ] = LOADS,
    profile: Annotated[bool, typer.Option(help="Kernels of a step, on a GPU.")] = False,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="The prompts have been answered once before.")
    ] = False,
    model_dir: ModelDir = None,
    runner: Annotated[Path, typer.Option(help="The runner's binary.", **PATH)] = RUNNER,
) -> None:
    """Time many sequences at once: throughput, first token, time between tokens."""
    from et_moe.benchmarks.batch import Load, measure
    from et_moe.benchmarks.shape import model_shape

    loads = [Load.parse(text) for text in load]
    how = {"profiled": profile, "prefix_cache": prefix_cache}
    raise typer.Exit(not measure(runner, program, loads, model_shape(model_dir), out, **how))


@app.command()
def peers(
    e2e: Annotated[Path, typer.Option(help="Result of `e2e`, from this GPU.", **PATH)],
    out: Out = RESULTS / "peers.json",
    prompts: Prompts = "1600",
    new_tokens: NewTokens = 512,
    model_dir: ModelDir = None,
    llama_bench: Annotated[
        Path | None, typer.Option(help="llama.cpp's benchmark binary.", **PATH)
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(help="Its model; where it is missing, a random one is written.", **PATH),
    ] = None,
) -> None:
    """Run other implementations of the model on this GPU, and compare them with `e2e`."""
    from et_moe.benchmarks.peers.compare import measure
    from et_moe.benchmarks.shape import model_shape

    if (llama_bench is None) != (gguf is None):
        raise typer.BadParameter("--llama-bench and --gguf go together")
    lengths, llama = _numbers(prompts, "--prompts"), (llama_bench, gguf) if gguf else None
    raise typer.Exit(not measure(e2e, lengths, new_tokens, model_shape(model_dir), llama, out))


@app.command()
def activations(
    bundle: Annotated[Path, typer.Option(help="Folder of `et-moe quantize`.", **PATH)],
    out: Out = RESULTS / "activations.json",
    tokens: Annotated[int, typer.Option(help="Positions to compare.", min=2)] = 1600,
    seed: Annotated[int, typer.Option(help="Of the random token ids.")] = 0,
) -> None:
    """Compare a bundle run with INT8 activations and with bf16 ones."""
    from et_moe.benchmarks.activations import measure

    measure(bundle, tokens, seed, out)


@app.command()
def quality(
    text: Annotated[Path, typer.Option(help="Folder of scripts/reference_text.py.", **PATH)],
    out: Out = RESULTS / "quality.json",
    minutes: Annotated[float, typer.Option(help="That the command may take.", min=0.01)] = 9,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
) -> None:
    """Train a reference model on a GPU, and measure what each way to quantize it costs."""
    from et_moe.benchmarks.reference.measure import measure
    from et_moe.benchmarks.reference.training import Text

    measure(Text(text), out, minutes, seed)


@app.command()
def drafts(
    model_dir: Annotated[
        Path, typer.Option(help="A checkpoint with an MTP head, or its bundle.", **PATH)
    ] = REPO / "examples/qwen3_5_moe/demo_checkpoint",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8; by default heldout.txt of --model-dir.", **PATH)
    ] = None,
    out: Out = RESULTS / "drafts.json",
    sequences: Annotated[int, typer.Option(help="Prompts, from all over the text.", min=1)] = 32,
    prompt: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 32,
    new_tokens: NewTokens = 128,
    temperature: Annotated[float, typer.Option(help="Of what is drawn; 0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Count how many drafts of the MTP head are accepted, by the eager references."""
    from et_moe.benchmarks.drafts import Sizes, measure

    sizes = Sizes(sequences, prompt, new_tokens)
    measure(model_dir, text or model_dir / "heldout.txt", sizes, temperature, seed, out)


@app.command()
def tune(
    tables: Annotated[str, typer.Option(help="Tables to tune, by commas; by default all.")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to tune for, by commas.")] = (
        "1,2,4,16,64,256,2048"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print, and leave the tables alone.")
    ] = False,
    pack: Annotated[
        Path | None,
        typer.Option(help="Compile the kernels into this file, for --packed.", **PATH),
    ] = None,
    gpu: Annotated[str, typer.Option(help="With --pack: the GPU they are for.")] = "NVIDIA H200",
    packed: Annotated[
        Path | None,
        typer.Option(help="Time kernels that --pack has compiled elsewhere.", **PATH),
    ] = None,
) -> None:
    """Time the candidates of the tuning tables, and enter the fastest for this GPU."""
    import triton

    from et_moe.backends.cuda.gpu import GPUS
    from et_moe.benchmarks.tune import pack_tables, tune_tables

    chosen, counts = tables.split(",") if tables else None, _numbers(tokens, "--tokens")
    if pack is None:
        tune_tables(chosen, counts, dry_run, packed)
        return
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("unset TRITON_INTERPRET: nothing is compiled under it")
    found = [known for known in GPUS if known.name == gpu]
    if not found:
        raise typer.BadParameter(f"{gpu!r} is none of {[known.name for known in GPUS]}")
    pack_tables(found[0], chosen, counts, pack, processes=2)


@app.command()
def static(
    write: Annotated[
        Path | None, typer.Option(help="JSON file for a row a kernel.", callback=_writable, **PATH)
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="Such a file: list kernels whose code is not as there.", **PATH),
    ] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    processes: Annotated[int, typer.Option(help="Compiler processes.", min=1)] = 2,
    changed: Annotated[
        bool, typer.Option(help="Only kernels that are not recorded, and a sample.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Record that all is well, for --changed.")] = False,
) -> None:
    """Compile every kernel for every architecture, and check the machine code; without a GPU."""
    from et_moe.benchmarks.static.command import check

    raise typer.Exit(not check(write, compare, processes, only, changed, record))


@app.command()
def cpu(
    model_dir: Annotated[Path, typer.Option(help="The checkpoint, for Hugging Face.", **PATH)] = (
        REPO / "examples/qwen3_5_moe/demo_checkpoint"
    ),
    program_dir: Annotated[Path, typer.Option(help="Its program, for the runner.", **PATH)] = (
        REPO / "build/demo"
    ),
    tokens: NewTokens = 64,
    iterations: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 5,
) -> None:
    """Time decode of a CPU program against Hugging Face's eager model."""
    from et_moe.benchmarks.cpu import measure

    measure(model_dir, program_dir, tokens, iterations)


@app.command()
def overhead(
    program: Annotated[Path, typer.Option(help="Folder of a program.", **PATH)] = (
        REPO / "build/demo"
    ),
    out: Out = RESULTS / "overhead.json",
    load: Annotated[
        list[str], typer.Option(help="SEQUENCES:PROMPT:NEW_TOKENS[:REQUESTS]; repeatable.")
    ] = ("1:1600:512", "64:1700:600"),
    model_dir: ModelDir = None,
    runner: Annotated[Path, typer.Option(help="The runner's binary.", **PATH)] = RUNNER,
) -> None:
    """Time the same requests through the runner and through the server."""
    from et_moe.benchmarks.batch import Load
    from et_moe.benchmarks.overhead import measure
    from et_moe.benchmarks.shape import model_shape

    loads = [Load.parse(text) for text in load]
    raise typer.Exit(not measure(runner, program, loads, model_shape(model_dir), out))


@app.command()
def clients(
    program: Annotated[Path, typer.Option(help="Folder of a program.", **PATH)] = (
        REPO / "build/demo"
    ),
    count: Annotated[int, typer.Option("--clients", help="How many there are.", min=1)] = 500,
    seconds: Annotated[float, typer.Option(help="For which they come and go.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Of what they ask, and when.")] = 0,
) -> None:
    """Serve a program to clients that come and go at random, and check each answer."""
    from et_moe.benchmarks.clients import measure

    raise typer.Exit(not measure(program, count, seconds, seed))


@app.command()
def memory(
    folder: Annotated[
        Path, typer.Argument(help="For the files: 3 GB a layer, removed again.", **PATH)
    ],
    layers: Annotated[list[int] | None, typer.Option(help="Sizes to compare; default 4.")] = None,
    gptq: Annotated[
        bool,
        typer.Option(
            "--gptq",
            help="Of one in the layout of the official GPTQ checkpoint, made of holes: open all of "
            "its 124,611 tensors, and quantize as many layers.",
        ),
    ] = False,
) -> None:
    """Measure peak memory and CPU time of quantizing and exporting a checkpoint of the 35B."""
    from et_moe.benchmarks import memory

    run = memory.measure_gptq if gptq else memory.measure
    raise typer.Exit(not run(folder, layers or [4]))


@app.command()
def roofline(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=2)] = 1600,
    context: Annotated[int, typer.Option(help="Cached tokens in decode.", min=0)] = 1600,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth, TB/s.")] = 4.3,
    int8: Annotated[float, typer.Option(help="INT8 tensor cores, tera operations/s.")] = 1600.0,
    bf16: Annotated[float, typer.Option(help="bf16 tensor cores, tera operations/s.")] = 800.0,
    launch: Annotated[float, typer.Option(help="Microseconds between two kernels.")] = 1.2,
    model_dir: ModelDir = None,
) -> None:
    """Print bytes, operations and least times of the model's kernels; from shapes alone."""
    from et_moe.benchmarks.roofline import print_costs
    from et_moe.benchmarks.shape import model_shape

    roof = {"bandwidth": bandwidth * 1e12, "int8": int8 * 1e12, "bf16": bf16 * 1e12}
    print_costs(tokens, context, roof, launch, model_shape(model_dir))


@app.command()
def report(
    results: Annotated[
        Path | None,
        typer.Argument(help="Folder of new results; by default only the page is made.", **PATH),
    ] = None,
) -> None:
    """Put results into benchmarks/results, and make docs/results.md with its plots of them."""
    from et_moe.benchmarks.report.page import update

    update(results)


def main() -> None:
    """Entry point: a bad input ends with one line on stderr and exit code 1."""
    try:
        invoke(app, prog_name="python -m et_moe.benchmarks")
    except (ValueError, OSError) as error:
        show_error(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
