"""Makes programs of checkpoints, and runs them: the command line `et-moe`."""

import typer

from et_moe.pipeline import cli as pipeline
from et_moe.pipeline.entry import run
from et_moe.serving import cli as serving

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, help=__doc__)
app.add_typer(pipeline.app)
app.add_typer(serving.app)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
