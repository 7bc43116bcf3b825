"""Train the demo checkpoint: a small Qwen3.5 MoE that chats about Python and calls tools.

    python scripts/train_demo.py prepare --output CORPUS
    python scripts/train_demo.py train --corpus CORPUS --output DIR --minutes 5

The first command gathers what the running Python documents of itself (PSF licence), and takes no
GPU. The second one generates conversations about it, trains the model on both, and then its head
for multi-token prediction. With `--steps` in place of `--minutes` the same Python, seed and number
of steps give the same checkpoint on a CPU.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen3_5MoeForCausalLM

from et_moe.examples.qwen3_5_moe.tokenizer import END_OF_TEXT, IM_END
from et_moe.scripts.demo_data.corpus import FILES, Corpus
from et_moe.scripts.demo_data.corpus import prepare as prepare_corpus
from et_moe.scripts.demo_data.samples import Packed, generate, make_samples
from et_moe.scripts.demo_training import head as head_training
from et_moe.scripts.demo_training import trunk
from et_moe.scripts.demo_training.batches import Conversations, Documents
from et_moe.scripts.demo_training.head import Unrolled, to_checkpoint
from et_moe.scripts.demo_training.measure import acceptance, exact_answers, perplexity
from et_moe.scripts.demo_training.model import compute_all_experts, model_config
from et_moe.scripts.demo_training.rounding import rounding
from et_moe.scripts.demo_training.schedule import Progress

GENERATION_SHARE, TRUNK_SHARE, HEAD_SHARE = 0.14, 0.76, 0.96
"""By when, of all minutes, conversations, the model and its head have to be done."""
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.9}
"""What a served model takes where a request says nothing: so small a model is unsure of much."""
HEAD_STEPS = 4  # steps of the model for one of the head

app = typer.Typer(add_completion=False)


def save_checkpoint(model: Qwen3_5MoeForCausalLM, corpus: Corpus, output: Path) -> None:
    """Writes the bfloat16 checkpoint without a head, each file by a rename."""
    output.mkdir(parents=True, exist_ok=True)
    end, im_end = (corpus.tokenizer.token_to_id(token) for token in (END_OF_TEXT, IM_END))
    model.generation_config = GenerationConfig(
        **SAMPLING, eos_token_id=[im_end, end], pad_token_id=end
    )
    with tempfile.TemporaryDirectory(dir=output, prefix=".tmp") as temporary:
        copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(temporary)
        for name in FILES:
            shutil.copy(corpus.folder / name, temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, output / path.name)


def save_head(unrolled: Unrolled, checkpoint: Path) -> None:
    """Adds a head to a checkpoint of one file, or replaces the one that it has."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
    config = json.loads((checkpoint / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    with tempfile.TemporaryDirectory(dir=checkpoint, prefix=".tmp") as temporary:
        folder = Path(temporary)
        tensors |= to_checkpoint(unrolled.head.state_dict())
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text)
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / name, checkpoint / name)


def _set_up(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)  # the result depends on the number of threads
        torch.use_deterministic_algorithms(True)


def _measure(
    model: Qwen3_5MoeForCausalLM, corpus: Corpus, unseen: Packed, size: int, device: torch.device
) -> None:
    """Prints what the weights that are saved are worth, and what their INT4 is."""
    model.to(torch.bfloat16).to(torch.float32)
    for name, on in (("bfloat16", False), ("INT4", True)):
        typer.echo(f"as {name}:")
        with rounding(model, on):
            _measure_as_it_is(model, corpus, unseen, size, device)


def _measure_as_it_is(
    model: Qwen3_5MoeForCausalLM, corpus: Corpus, unseen: Packed, size: int, device: torch.device
) -> None:
    tokens = torch.tensor(corpus.tokenizer.encode(corpus.held_out).ids, device=device)
    value, shares = perplexity(model, tokens)
    typer.echo(
        f"held-out text: perplexity {value:.3f} per token, "
        f"{math.log2(value) * len(tokens) / len(corpus.held_out):.3f} bits per byte, "
        f"expert shares {shares.min():.3f} to {shares.max():.3f}"
    )
    for kind, (share, count) in exact_answers(model, unseen, size, device).items():
        typer.echo(f"held-out conversations: {kind}: {share:.1%} of {count} answers exact")


@app.command()
def prepare(
    output: Annotated[Path, typer.Option(help="folder to make")],
    seed: Annotated[int, typer.Option(help="of the split into texts to train and hold out")] = 0,
) -> None:
    """Gather the running Python's documentation, and make a tokenizer of it."""
    prepare_corpus(output, seed)


@app.command()
def train(
    corpus: Annotated[Path, typer.Option(help="folder made by `prepare`")],
    output: Annotated[Path, typer.Option(help="folder to write the checkpoint into")],
    minutes: Annotated[float | None, typer.Option(help="how long all of it may take")] = None,
    steps: Annotated[int | None, typer.Option(min=4, help="steps of the model, in place")] = None,
    conversations: Annotated[int, typer.Option(min=1, help="how many to make")] = 240_000,
    unseen: Annotated[int, typer.Option(min=1, help="how many to make for measurements")] = 2000,
    batch_tokens: Annotated[int, typer.Option(min=512, help="tokens of a batch")] = 32_768,
    processes: Annotated[int, typer.Option(min=1, help="that make conversations")] = 16,
    seed: Annotated[int, typer.Option(help="of weights, conversations and batches")] = 0,
) -> None:
    """Train the demo checkpoint and its head, and write them in Hugging Face layout."""
    start = time.monotonic()
    if (minutes is None) == (steps is None):
        raise typer.BadParameter("--minutes or --steps: expected one of them")

    def progress(share: float, number: int | None) -> Progress:
        return Progress(number, None if minutes is None else start + share * 60 * minutes)

    seconds = math.inf if minutes is None else GENERATION_SHARE * 60 * minutes
    text = Corpus.read(corpus)
    packed = generate(corpus, text.facts, seed, conversations, processes, seconds)
    held_out = Packed.of(make_samples(corpus, text.facts, f"{seed} held out", unseen, True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _set_up(seed, device)
    documents = Documents(torch.tensor(text.document_ids()), batch_tokens // 2, device)
    talks = Conversations(packed, batch_tokens, device)
    model = Qwen3_5MoeForCausalLM(model_config(text.tokenizer)).to(device)
    compute_all_experts(model)
    typer.echo(
        f"{len(packed.lengths)} conversations of {len(packed.ids)} tokens, of which "
        f"{packed.learned.sum()} are learned; {len(documents)} tokens of documents; "
        f"{sum(p.numel() for p in model.parameters())} parameters; "
        f"{time.monotonic() - start:.0f} seconds"
    )
    trunk.train(model, talks, documents, progress(TRUNK_SHARE, steps), seed, typer.echo)
    _measure(model, text, held_out, batch_tokens, device)
    save_checkpoint(model, text, output)

    head_steps = None if steps is None else max(1, steps // HEAD_STEPS)
    rest = progress(HEAD_SHARE, head_steps)
    unrolled = head_training.train(model, talks, documents, rest, seed + 1, typer.echo)
    save_head(unrolled, output)
    unrolled.head.to(torch.bfloat16).to(torch.float32)
    unseen_talks = Conversations(held_out, batch_tokens, device)
    shares = acceptance(unrolled, unseen_talks, head_training.DEPTH)
    typer.echo(
        "held-out conversations: drafts accepted: "
        + ", ".join(f"{share:.1%}" for share in shares)
        + f"; {time.monotonic() - start:.0f} seconds in all"
    )


if __name__ == "__main__":
    app()
