"""INT8 against bf16 activations: cells of a table, and their part of the page."""

from et_moe.benchmarks.report.markdown import source, table

LAYERS = 10
"""Layers that share a line of the page."""


def cells(row: dict) -> list[str]:
    """A layer's row as text."""
    errors = (f"{row[key]:.3%}" for key in ("moe_error", "hidden_error"))
    return [str(row["layer"]), row["kind"], *errors]


def _groups(layers: list[dict]) -> list[list[str]]:
    lines = []
    for first in range(0, len(layers), LAYERS):
        group = layers[first : first + LAYERS]
        errors = [row["moe_error"] for row in group]
        figures = (sum(errors) / len(errors), max(errors), group[-1]["hidden_error"])
        name = f"{group[0]['layer']} to {group[-1]['layer']}"
        lines.append([name, *(f"{figure:.2%}" for figure in figures)])
    return lines


def section(result: dict) -> list[str]:
    """Markdown of a result of the command `activations`."""
    errors = [row["moe_error"] for row in result["layers"]]
    head = ("layers", "MoE output, mean", "MoE output, largest", "hidden state after the last")
    return [
        "## INT8 against bf16 activations",
        "",
        *source(result),
        f"One bundle run with both over {result['tokens']} random positions, by "
        f"{result['kernels']}. Relative L2 error of a mixture of experts on the same input: mean "
        f"{sum(errors) / len(errors):.2%}, largest {max(errors):.2%}. Both have the same likeliest "
        f"token at {result['top1_agreement']:.1%} of the positions; the weights are random, and "
        f"many positions near ties. Relative error of the logits: {result['logits_error']:.1%}.",
        "",
        *table(head, _groups(result["layers"])),
    ]
