"""The training of the demo model and of its head: it repeats itself, and it learns."""

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import storages
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM
from typer.testing import CliRunner

from et_moe.benchmarks import drafts
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.scripts import train_demo
from et_moe.scripts.demo_data import corpus
from et_moe.scripts.demo_data import documents as docs
from et_moe.scripts.demo_data.corpus import DEMO
from et_moe.scripts.demo_data.library import Fact
from et_moe.scripts.demo_data.samples import Packed, make_samples
from et_moe.scripts.demo_training import head, trunk
from et_moe.scripts.demo_training.batches import ROW, Conversations, Documents, mixed
from et_moe.scripts.demo_training.measure import acceptance, exact_answers, perplexity
from et_moe.scripts.demo_training.model import compute_all_experts, model_config
from et_moe.scripts.demo_training.rounding import GROUP_SIZE, int4_weights, rounding
from et_moe.scripts.demo_training.schedule import (
    CHECKED_EVERY,
    PEAK_LR,
    Optimizer,
    Progress,
    learning_rate,
)

CPU = torch.device("cpu")
FACT = Fact("function", "os", "os.getcwd", "getcwd()", "Return the default between others.")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the script does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> Tensor:
    return torch.tensor(tokenizer.encode((DEMO / "heldout.txt").read_text()).ids)[:1100]


@pytest.fixture(scope="module")
def packed() -> Packed:
    short = [s for s in make_samples(DEMO, [FACT], "test", 40) if len(s.ids) < 128]
    return Packed.of(short)


def new_model(tokenizer: Tokenizer) -> Qwen3_5MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3_5MoeForCausalLM(model_config(tokenizer))


def test_all_experts_are_the_chosen_ones(tokenizer: Tokenizer, ids: Tensor) -> None:
    model = new_model(tokenizer)
    found = []
    for _ in range(2):
        model.zero_grad()
        logits = model(ids[None, :40], use_cache=False).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        compute_all_experts(model)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_rounded_weights_are_int4_and_come_back(tokenizer: Tokenizer) -> None:
    model = new_model(tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = {id(weight) for weight in int4_weights(model)}
    with pytest.raises(KeyError), rounding(model):
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]) == (id(weight) not in rounded), name
            if id(weight) in rounded:
                groups = weight.detach().unflatten(-1, (-1, GROUP_SIZE))
                assert max(len(group.unique()) for group in groups.flatten(0, -2)[:50]) <= 15
        raise KeyError
    with rounding(model, on=False):
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # What `et-moe quantize` stores as INT4 by default.
    parts = (
        "experts",
        "shared_expert.",
        "self_attn.",
        "in_proj_qkv",
        "in_proj_z",
        "out_proj",
        "head",
    )
    names = {name for name, p in model.named_parameters() if id(p) in rounded}
    assert names == {
        name
        for name, p in model.named_parameters()
        if p.dim() > 1 and any(part in name for part in parts) and "norm" not in name
    }


def test_training_repeats_and_learns(tokenizer: Tokenizer, ids: Tensor, packed: Packed) -> None:
    texts = Conversations(packed, 256, CPU), Documents(ids, ROW, CPU)
    ids = ids[:600]
    states, lines, values = [], [], [perplexity(new_model(tokenizer), ids)[0]]
    for _ in range(2):
        model = new_model(tokenizer)
        compute_all_experts(model)
        trunk.train(model, *texts, Progress(steps=6), 0, lines.append)
        states.append(model.state_dict())
        values.append(perplexity(model, ids)[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert values[1] == values[2] < 0.8 * values[0]
    assert "conversations" in lines[0] and "documents" in lines[0]


def test_the_head_learns_and_leaves_the_model_alone(
    tokenizer: Tokenizer, ids: Tensor, packed: Packed, tmp_path: Path
) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(DEMO, directory)
    model = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    talks, documents = Conversations(packed, 256, CPU), Documents(ids, ROW, CPU)
    batch = next(documents.epoch(np.random.default_rng(0)))
    heads, losses = [], []
    for _ in range(2):
        torch.manual_seed(0)
        losses = [head.Unrolled(model, head.make_head(model))(batch, 3)]
        torch.manual_seed(0)
        heads.append(head.train(model, talks, documents, Progress(steps=6), 0, lambda line: None))
        losses.append(heads[-1](batch, 3))
    first, second = (trained.head.state_dict() for trained in heads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(after < 0.9 * before for before, after in zip(*losses, strict=True))

    train_demo.save_head(heads[0], directory)
    old, new = (load_file(d / "model.safetensors") for d in (DEMO, directory))
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name]) == (not name.startswith("mtp.")), name
    assert {file.name for file in directory.iterdir()} == {file.name for file in DEMO.iterdir()}
    *_, group = Checkpoint(directory).groups(storages())
    fc = torch.cat([*group["mtp.fc_embedding.weight"], *group["mtp.fc_hidden.weight"]], 1)
    assert torch.equal(fc, first["eh_proj.weight"].to(torch.bfloat16))


def test_drafts_of_the_committed_head_are_accepted() -> None:
    """Most first drafts are, and each further one less often, behind prompts of held-out text."""
    sizes = drafts.Sizes(sequences=16, prompt=32, new_tokens=24)
    prompts = drafts.prompts_of(DEMO / "heldout.txt", DEMO / "tokenizer.json", sizes)
    with torch.no_grad():
        model = drafts.load_model(DEMO)
        sequences = drafts.Sequences(model, prompts, sizes.new_tokens, 0.0, 0)
        steps, *accepted = drafts.count_accepted(sequences, 3, drafts.Hidden())
    assert steps > accepted[0] > accepted[1] > accepted[2] > 0
    assert accepted[0] / steps > 0.45


def test_acceptance_counts_steps_whose_drafts_all_fit(packed: Packed) -> None:
    class Guesses:
        """A head whose drafts fit behind even tokens alone."""

        head = torch.nn.Identity()

        def guesses(self, tokens: Tensor, depth: int) -> tuple[Tensor, list[Tensor]]:
            wanted = tokens[:, 1:] * 2
            return wanted, [wanted + tokens[:, 1:] % 2] * depth

    ids = np.array([5, 4, 6, 8, 7, 2, 9, 9, 4], np.uint16)
    learned = np.ones(len(ids), bool)
    text = Packed(ids, learned, np.array([9], np.int32), np.array([0], np.int32), ["talk"])
    shares = acceptance(Guesses(), Conversations(text, 64, CPU), 2)
    # Six steps have two drafts in the text: behind 4, 6, 8, 7, 2, 9.
    assert shares == [pytest.approx(4 / 6), pytest.approx(2 / 6)]


def test_exact_answers_tells_the_text_from_its_answer(tokenizer: Tokenizer, packed: Packed) -> None:
    """A model that says the token it has just read is right only where the text repeats it."""

    class Echo(torch.nn.Module):
        def model(self, input_ids: Tensor, use_cache: bool):
            one_hot = torch.nn.functional.one_hot(input_ids, 16).float()
            return type("Output", (), {"last_hidden_state": one_hot})

        def lm_head(self, hidden: Tensor) -> Tensor:
            return hidden

    ids = np.array([1, 2, 3, 3, 3, 4, 5, 5, 6], np.uint16)
    text = Packed(ids, ids > 0, np.array([5, 4], np.int32), np.array([3, 2], np.int32), ["a", "b"])
    assert exact_answers(Echo(), text, 64, CPU) == {"a": (1.0, 1), "b": (0.0, 1)}


def test_batches_hold_every_conversation_and_mark_what_is_learned(packed: Packed) -> None:
    talks = Conversations(packed, 256, CPU)
    begins = np.cumsum(packed.lengths) - packed.lengths
    seen = []
    for rows, batch in talks.in_order():
        assert batch.tokens.numel() <= 256 or len(rows) == 1
        for row, tokens, learned, kept in zip(
            rows, batch.tokens, batch.learned, batch.kept, strict=True
        ):
            piece = slice(begins[row], begins[row] + packed.lengths[row])
            assert tokens[kept].tolist() == packed.ids[piece].tolist()
            assert learned[kept].tolist() == packed.learned[piece].tolist()
            assert not learned[~kept].any() and not tokens[~kept].any()
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(packed.lengths)))
    epoch = talks.epoch(np.random.default_rng(0))
    assert sum(len(batch.tokens) for batch in epoch) == len(packed.lengths)


def test_documents_are_spread_among_conversations(ids: Tensor, packed: Packed) -> None:
    texts = Conversations(packed, 256, CPU), Documents(ids, ROW, CPU)
    progress, kinds = Progress(steps=100), []
    for batch in mixed(*texts, progress, 0):
        progress.step += 1
        kinds.append(batch.kind)
    shown = [kinds[begin : begin + 50].count("documents") for begin in (0, 50)]
    # Ten times 1100 tokens in rows of 512.
    assert sum(shown) in (21, 22) and abs(shown[0] - shown[1]) <= 1 and len(kinds) == 100


def test_progress_by_steps_or_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(steps=4, end=110.0)
    assert progress.share == 0
    progress.step = 1
    assert progress.share == 0.25
    now[0] = 105.0
    assert progress.share == 0.5
    now[0] = 200.0
    assert progress.share == 1
    with pytest.raises(ValueError, match="steps or an end"):
        Progress()
    rates = [learning_rate(share / 100) for share in range(101)]
    assert max(rates) == pytest.approx(PEAK_LR) and rates[0] < 0.1 * PEAK_LR
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 0.03 * PEAK_LR


def test_a_training_that_diverges_goes_on_from_where_it_was_well() -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = Optimizer(layer, Progress(steps=1000))
    for _ in range(CHECKED_EVERY):
        layer(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for _ in range(CHECKED_EVERY):
        layer(torch.full((1, 2), math.nan)).sum().backward()
        optimizer.step()
    assert all(torch.equal(kept[name], tensor) for name, tensor in layer.state_dict().items())
    layer(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())


def test_the_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps from texts to a checkpoint with its head, of the committed one's form."""
    texts = (DEMO / "heldout.txt").read_text().split("\n\n")
    documents = {f"{n}.py": "\n\n".join(texts[n:][:30]) for n in range(0, 60, 6)}
    monkeypatch.setattr(corpus, "collect_documents", lambda: documents)
    monkeypatch.setattr(docs, "HELD_OUT_BYTES", 1000)
    monkeypatch.setattr(corpus, "library", lambda: [FACT])
    folder, output = tmp_path / "corpus", tmp_path / "out"
    run = CliRunner().invoke(train_demo.app, ["prepare", "--output", str(folder)])
    assert run.exit_code == 0, run.output
    read = corpus.Corpus.read(folder)
    assert read.facts == [FACT] and set(read.documents) < set(documents.values())
    assert read.held_out.strip() in documents.values()
    shutil.copy(DEMO / "tokenizer.json", folder)  # for the same size of vocabulary
    sizes = "--steps=4 --conversations=8 --unseen=3 --batch-tokens=512 --processes=1"
    arguments = ["train", "--corpus", str(folder), "--output", str(output), *sizes.split()]
    run = CliRunner().invoke(train_demo.app, arguments)
    assert run.exit_code == 0, run.output
    assert "drafts accepted" in run.output
    expected = {file.name for file in DEMO.iterdir()} - {"README.md"}
    assert {file.name for file in output.iterdir()} == expected
    old, new = (load_file(d / "model.safetensors") for d in (DEMO, output))
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
        n: (t.dtype, t.shape) for n, t in new.items()
    }
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (output / name).read_text() == (DEMO / name).read_text()
    both = CliRunner().invoke(train_demo.app, [*arguments, "--minutes", "1"])
    assert both.exit_code != 0 and "expected one of them" in both.output
