"""The MTP head's drafts against Hugging Face's MTP layer around its decoder layer, in fp32."""

import copy
from pathlib import Path

import pytest
import torch
from checkpoints import make_small, storages, write
from sequences import one_sequence
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
)

from et_moe.examples.qwen3_5_moe.graph import Places
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.examples.qwen3_5_moe.mtp import Qwen3_5MoeMtp
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.make_bundle import make_bundle
from et_moe.pipeline.quantize import QuantizedCheckpoint, WeightSource, meta_graph
from et_moe.pipeline.storage import Precision

THEIRS = {
    "mtp.fc.": "eh_proj.",
    "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
    "mtp.layers.0.": "mtp_block.",
    "mtp.norm.": "post_norm.",
}
PROMPT, DRAFTS = 70, 3


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def load(source: WeightSource) -> Qwen3_5MoeMtp:
    """The graph of a source in fp32, with its weights."""
    model = meta_graph(source.config, Precision(source.storages, dtype=torch.float32))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    tensors = {n: t.to(dtypes[n]) for group in source.groups() for n, t in group.items()}
    model.load_state_dict(tensors, assign=True)
    return model


class Theirs:
    """Hugging Face's model, with its MTP layer: every call sees all rows, and no cache."""

    def __init__(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        self.model = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        self.layer = MtpLayer(config, Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm, 0).eval()
        state = {
            theirs + name.removeprefix(ours): tensor.float()
            for name, tensor in tensors.items()
            for ours, theirs in THEIRS.items()
            if name.startswith(ours)
        }
        self.layer.load_state_dict(state)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]

    def draft(self, hidden: Tensor, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """States and logits of rows whose positions are counted from `first`."""
        embedded = self.model.model.embed_tokens(tokens)[None]
        positions = torch.arange(first, first + len(tokens)).expand(3, 1, -1)
        rotation = self.model.model.rotary_emb(embedded, positions)
        states = self.layer(embedded, hidden[None], rotation, None, None, None)
        return states[0], self.model.lm_head(states)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3_5MoeMtp, Theirs]:
    """Our model and theirs, of weights large enough for every part to count."""
    folder = tmp_path_factory.mktemp("mtp")
    config, tensors = make_small(folder / "small", mtp_num_hidden_layers=1)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if tensor.dim() >= 2 and "conv1d" not in name:
            tensor.mul_(4)
        elif name.endswith("norm.weight") or "pre_fc_norm" in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.4)
    directory = write(folder / "c", config, tensors)
    source = QuantizedCheckpoint(Checkpoint(directory), storages("none", 32, "none"))
    with torch.no_grad():
        return load(source), Theirs(directory, tensors)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class Ours:
    """Our model with one sequence, whose rows come piece by piece."""

    def __init__(self, model: Qwen3_5MoeMtp) -> None:
        self.model = model
        self.state, self.where = one_sequence(model, PROMPT + 2 * DRAFTS)

    def places(self, begin: int, rows: int) -> Places:
        given = (torch.tensor([begin]), *self.where.values(), torch.tensor([rows]))
        return Places(*given)

    def hidden(self, tokens: Tensor, pieces: tuple[int, ...]) -> Tensor:
        found, begin = [], 0
        for piece in tokens.split(pieces):
            rows = self.places(begin, len(piece))
            found.append(self.model.hidden(piece[None], rows, self.state))
            begin += len(piece)
        return self.model.normed(torch.cat(found))

    def draft(
        self, hidden: Tensor, tokens: Tensor, begin: int, padding: int = 0
    ) -> tuple[Tensor, Tensor]:
        """States and logits of rows from `begin` on; rows of padding follow them in the call."""
        rows = len(tokens)
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding), value=3.0)
        tokens = torch.nn.functional.pad(tokens, (0, padding))[None]
        places = self.places(begin, rows)
        states, logits = self.model.draft(hidden, tokens, places, self.state)
        return states[:rows], logits[:rows]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (PROMPT + 1,), generator=torch.Generator().manual_seed(2))


def test_the_hidden_state_is_the_one_behind_the_final_norm(pair, tokens) -> None:
    ours, theirs = pair
    for pieces in ((PROMPT,), (1, 64, 5)):
        close(Ours(ours).hidden(tokens[:-1], pieces), theirs.hidden(tokens[:-1]))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("pieces", [(PROMPT,), (5, 64, 1)])
def test_rows_of_a_prompt(pair, tokens, pieces: tuple[int, ...], first: int) -> None:
    """Row t takes h_t and token t + 1, the last one the token that was drawn; the cache is filled
    piece by piece. Whether positions are counted from 0 or, as Hugging Face does, from 1 is all
    the same."""
    ours, theirs = pair
    hidden = theirs.hidden(tokens[:-1])
    expected, expected_logits = theirs.draft(hidden, tokens[1:], first)
    assert expected_logits.std() > 0.1
    sequence, begin, found = Ours(ours), 0, []
    for rows, behind in zip(hidden.split(pieces), tokens[1:].split(pieces), strict=True):
        found.append(sequence.draft(rows, behind, begin, padding=2))
        begin += len(rows)
    states, logits = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    close(states, expected)
    close(logits, expected_logits)
    assert torch.equal(logits.argmax(-1), expected_logits.argmax(-1))


def test_further_drafts_and_the_step_behind_them(pair, tokens) -> None:
    """The head's own state and draft make the next row. Rows of accepted tokens are computed anew
    from the model's states, and what the cache has of refused drafts is never seen."""
    ours, theirs = pair
    sequence = Ours(ours)
    sequence.draft(theirs.hidden(tokens[:-1])[:-1], tokens[1:-1], 0)
    hidden, behind, begin = theirs.hidden(tokens[:-1]), tokens[1:], PROMPT - 1
    for _ in range(2):  # two steps: the second with one accepted draft
        rows, given = hidden[begin:], behind[begin:]
        drafts = []
        for _ in range(DRAFTS):
            expected, expected_logits = theirs.draft(hidden, behind, 0)
            states, logits = sequence.draft(rows, given, begin)
            close(states, expected[begin:])
            close(logits, expected_logits[begin:])
            drafts.append(expected_logits[-1:].argmax(-1))
            hidden, behind = torch.cat((hidden, expected[-1:])), torch.cat((behind, drafts[-1]))
            rows, given, begin = expected[-1:], drafts[-1], len(hidden) - 1
        # The model draws the first draft and then another token.
        drawn = torch.cat((tokens, drafts[0], (drafts[1] + 1) % 256))
        hidden, behind, begin = theirs.hidden(drawn[:-1]), drawn[1:], PROMPT


def test_each_input_counts(pair, tokens) -> None:
    """A test that cannot fail is none: halves of fc, norms and positions in another order."""
    ours, theirs = pair
    hidden = theirs.hidden(tokens[:-1])
    expected, _ = theirs.draft(hidden, tokens[1:], 0)
    raw = Ours(ours)
    raw = ours.hidden(tokens[:-1][None], raw.places(0, PROMPT), raw.state)
    wrong = {"state in front of the norm": (raw, tokens[1:]), "own token": (hidden, tokens[:-1])}
    for what, given in wrong.items():
        states, _ = Ours(ours).draft(*given, 0)
        assert (states - expected).abs().max() > 0.1, what
    swapped = copy.deepcopy(ours)
    mtp = swapped.mtp
    mtp.fc_embedding, mtp.fc_hidden = mtp.fc_hidden, mtp.fc_embedding
    assert (Ours(swapped).draft(hidden, tokens[1:], 0)[0] - expected).abs().max() > 0.1


def test_a_quantized_head_drafts(tmp_path: Path) -> None:
    """INT4 with INT8 activations: finite, and spread."""
    make_bundle(tmp_path, MODEL, "tiny", 0, overrides={"mtp_num_hidden_layers": 1})
    model = load(Bundle(tmp_path))
    sequence, tokens = Ours(model), torch.arange(9)
    states, logits = sequence.draft(sequence.hidden(tokens, (9,)), tokens + 1, 0)
    assert torch.isfinite(states).all() and torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
