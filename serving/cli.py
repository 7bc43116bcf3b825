"""The commands of serving, which `et-moe` has beside those of the pipeline."""

import typer

app = typer.Typer()
