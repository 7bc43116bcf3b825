"""The demo checkpoint's MTP head: what its drafts are worth, and the script that trains it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import storages
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen3_5MoeForCausalLM

from et_moe.benchmarks import drafts
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.scripts import train_demo, train_demo_mtp

DEMO = Path(train_demo.__file__).parent.parent / "examples" / "qwen3_5_moe" / "demo_checkpoint"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the script does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_drafts_are_accepted() -> None:
    """Most first drafts are, and each further one less often, behind prompts of held-out text."""
    sizes = drafts.Sizes(sequences=16, prompt=32, new_tokens=24)
    prompts = drafts.prompts_of(DEMO / "heldout.txt", DEMO / "tokenizer.json", sizes)
    with torch.no_grad():
        model = drafts.load_model(DEMO)
        sequences = drafts.Sequences(model, prompts, sizes.new_tokens, 0.0, 0)
        steps, *accepted = drafts.count_accepted(sequences, 3, drafts.Hidden())
    assert steps > accepted[0] > accepted[1] > accepted[2] > 0
    assert accepted[0] / steps > 0.45


def test_training_repeats_learns_and_leaves_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_demo, "BATCH", 2)
    directory = tmp_path / "demo"
    shutil.copytree(DEMO, directory)
    model = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode((directory / "heldout.txt").read_text()).ids)[:1100]
    piece = tokens[None, :512].view(2, 256)
    heads, losses = [], []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            before = train_demo_mtp.Unrolled(model, train_demo_mtp.make_head(model))
            losses = [before(piece, 3)]
            torch.manual_seed(0)
            heads.append(train_demo_mtp.train(model, tokens, steps=6, seed=0))
            losses.append(train_demo_mtp.Unrolled(model, heads[-1])(piece, 3))
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = (head.state_dict() for head in heads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(after < 0.9 * before for before, after in zip(*losses, strict=True))

    train_demo_mtp.save(heads[0], directory)
    old, new = (load_file(d / "model.safetensors") for d in (DEMO, directory))
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]) == (not name.startswith("mtp.")), name
    assert {file.name for file in directory.iterdir()} == {file.name for file in DEMO.iterdir()}
    *_, head = Checkpoint(directory).groups(storages())
    fc = torch.cat([*head["mtp.fc_embedding.weight"], *head["mtp.fc_hidden.weight"]], 1)
    assert torch.equal(fc, first["eh_proj.weight"].to(torch.bfloat16))
