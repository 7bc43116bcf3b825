"""What quantizing costs the reference model: its part of the page."""

from collections.abc import Iterable

from et_moe.benchmarks.report.markdown import number, source, table

BITS, KL, TOP1 = 4.6, 0.010, 0.96
"""What a recipe is to reach: at most so many bits a weight, such a divergence, such agreement."""

SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "vocab_size",
)
"""What is kept of the model's configuration."""

EVERY = 10
"""Of the rows about the training one in so many is kept."""

HEAD = ("recipe", "scales", "activations", "bits a weight", "MB a token", "KL", "top-1")


def condense(result: dict) -> dict:
    """What the tree keeps of a result of the command `quality`."""
    training = result["training"]
    kept = [row for i, row in enumerate(training) if i % EVERY == 0 or row is training[-1]]
    shape = {key: result["config"][key] for key in SHAPE}
    return result | {"config": shape, "training": kept}


def _cells(row: dict) -> list[str]:
    return [
        row["recipe"],
        row["scales"],
        row["activations"],
        f"{row['bits']:.2f}",
        f"{row['bytes_per_token'] / 1e6:.1f}",
        f"{row['kl']:.4f} ± {row['kl_error']:.4f}",
        f"{row['top1']:.1%}",
        f"{row['perplexity']:.3f}",
    ]


def _table(rows: Iterable[dict]) -> list[str]:
    return table((*HEAD, "perplexity"), map(_cells, rows), text_columns=3)


def _nearest(rows: list[dict], activations: str) -> list[str]:
    """Which row of few enough bits is best, and whether it reaches what it is to."""
    rows = [r for r in rows if r["bits"] <= BITS and r["activations"] == activations]
    if not rows:
        return []
    best = min(rows, key=lambda row: row["kl"])
    reached = best["kl"] <= KL and best["top1"] >= TOP1
    return [
        f"With {activations} activations `{best['recipe']}` comes nearest, its scales by "
        f"{best['scales']}: KL {best['kl']:.4f}, top-1 {best['top1']:.1%} at {best['bits']:.2f} "
        f"bits, which {'reaches it' if reached else 'does not reach it'}."
    ]


def _reached(rows: list[dict]) -> str:
    found = [text for dtype in ("int8", "bf16") for text in _nearest(rows, dtype)]
    goal = (
        f"The goal is a divergence of at most {KL} and an agreement of at least {TOP1:.0%} at "
        f"{BITS} bits a weight or less."
    )
    return " ".join([goal, *(found or ["No row takes so few bits."])])


def _sources(text: dict) -> str:
    packages = text["packages"]
    names = (f"{p['package']} {p['version']} ({p['licence']})" for p in packages)
    return ", ".join(names)


def section(result: dict) -> list[str]:
    """Markdown of a result of the command `quality`."""
    text, last = result["text"], result["training"][-1]
    low, high = result["expert_shares"]
    config = result["config"]
    lines = [
        "## Quality",
        "",
        *source(result),
        "`TEXT` is made by `python scripts/reference_text.py --output TEXT`.",
        "",
        f"The reference model: {number(result['parameters'])} parameters, "
        f"{config['num_hidden_layers']} layers, {config['num_experts']} experts of which a token "
        f"is sent to {config['num_experts_per_tok']}, and a shared one. It was trained for "
        f"{last['seconds']:.0f} s on {number(last['tokens'])} tokens (of "
        f"{number(text['parts']['train']['tokens'])} different ones) to a loss of "
        f"{last['loss']:.3f}; on held-out text its perplexity is {result['perplexity']:.3f} a "
        f"token, {result['bits_per_byte']:.3f} bits a byte. Experts get {low:.2%} to {high:.2%} of "
        "the tokens of their layer.",
        "",
        f"Compared with the bfloat16 weights at {number(result['positions'])} positions of "
        "held-out text, everything but weights and activations in fp32; the divergence with its "
        f"standard error. Importance was measured on {number(result['calibration_tokens'])} "
        "other tokens. `mse` is the scale of least squared error among few candidates, `search` "
        "among more. In front of weights that are not quantized activations stay as they are.",
        "",
        *_table(result["rows"]),
        "",
        _reached(result["rows"]),
        "",
        "Scales by half-quadratic optimisation (as HQQ does, p = 0.7, scales alone) were tried on "
        "the demo checkpoint and are not offered: with `mixed` KL 0.0149 against 0.0147 of least "
        "squares, and 0.0141 against 0.0135 where both count importance.",
        "",
        "For comparison, published by others, of the 35B: AesSedai's Q4_K_M, whose always active "
        "parts are Q8_0, has KL 0.0102. Unsloth finds `ssm_out` (here linear_attention.out) the "
        "most sensitive, then attention, then `down` of the experts.",
    ]
    if "parts" in result:
        lines += [
            "",
            "### One part quantized, the rest as it is",
            "",
            *_table(sorted(result["parts"], key=lambda row: -row["kl"])),
        ]
    return [*lines, "", f"The text: {_sources(text)}."]
