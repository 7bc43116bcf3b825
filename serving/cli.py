"""The commands of serving, which `et-moe` has beside those of the pipeline."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


def _folder(text: str) -> Path:
    if not text:
        raise typer.BadParameter("expected a folder, got an empty text")
    return Path(text)


Program = Annotated[
    Path,
    typer.Argument(help="Folder that `et-moe export` wrote.", parser=_folder, metavar="PROGRAM"),
]
MaxSequences = Annotated[
    int,
    typer.Option(
        min=1, max=2**20, help="Requests that are served at once; the memory of each is taken."
    ),
]


MemoryFraction = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=1, help="Of the GPU's memory, for all together. Default: all it takes."
    ),
]


@app.command()
def serve(
    program: Program,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What clients ask for. Default: the folder's name.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="ET_MOE_API_KEY", help="That clients must send. Default: none."),
    ] = None,
    max_sequences: MaxSequences = 8,
    memory_fraction: MemoryFraction = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Whether prompts that begin alike share what is computed.")
    ] = True,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1, max=2**20, help="Requests that may wait; more are refused with status 429."
        ),
    ] = 256,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, max=86400, help="That requests have to end in after SIGTERM."),
    ] = 25.0,  # most supervisors kill after 30
) -> None:
    """Serves a program over HTTP: OpenAI's interface, and a page to chat with at `/`."""
    from et_moe.serving.run_server import check_address
    from et_moe.serving.run_server import serve as run
    from et_moe.serving.served_model import model_opener
    from et_moe.serving.server import create_app

    if api_key is not None and not api_key.strip():
        raise typer.BadParameter("--api-key: expected a key")
    check_address(host, port)
    open_model = model_opener(
        program,
        model_name,
        max_sequences=max_sequences,
        max_waiting=max_waiting,
        memory_fraction=memory_fraction,
        prefix_cache=prefix_cache,
    )
    run(create_app(open_model, api_key), host, port, drain_seconds)


@app.command()
def chat(program: Program) -> None:
    """Chats with a program in the terminal."""
    import asyncio

    from et_moe.serving.served_model import model_opener
    from et_moe.serving.terminal_chat import terminal_chat

    asyncio.run(terminal_chat(model_opener(program, None, max_sequences=1)))
