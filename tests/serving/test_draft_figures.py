"""What callers are told of drafts: events, outputs of Python, metrics and usage."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_small, storages

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.serving.interface import Drafts, EngineStatus
from et_moe.serving.llm import LLM, SamplingParams
from et_moe.serving.metrics import Metrics
from et_moe.serving.openai.events import usage


def test_a_sum() -> None:
    total = sum((Drafts(3, 6, (2, 1)), Drafts(1, 3, (1, 1, 1)), Drafts()), Drafts())
    assert total == Drafts(4, 9, (3, 2, 1))


def test_usage_counts_what_was_accepted() -> None:
    generations = [
        SimpleNamespace(tokens=7, cached_tokens=0, drafts=drafts)
        for drafts in (Drafts(4, 8, (2, 1)), Drafts())
    ]
    details = usage(5, generations, 2)["completion_tokens_details"]
    assert details == {"reasoning_tokens": 2, "accepted_prediction_tokens": 3}
    assert usage(5, generations)["completion_tokens_details"] == {"accepted_prediction_tokens": 3}
    assert "completion_tokens_details" not in usage(5, generations[1:])


def test_metrics_count_by_position() -> None:
    metrics = Metrics(lambda: EngineStatus(0, 0, 1, 1, 1, 0, None))
    metrics.drafts(Drafts(4, 8, (3, 1)))
    metrics.drafts(Drafts(1, 2, (1, 1)))
    counters = {line for line in metrics.text().decode().splitlines() if "draft" in line}
    assert counters >= {
        "et_moe_draft_steps_total 5.0",
        "et_moe_draft_tokens_total 10.0",
        'et_moe_accepted_draft_tokens_total{position="0"} 4.0',
        'et_moe_accepted_draft_tokens_total{position="1"} 2.0',
    }


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, of whose drafts few are accepted."""
    folder = tmp_path_factory.mktemp("figures")
    make_small(folder / "checkpoint", mtp_num_hidden_layers=1)
    source = QuantizedCheckpoint(Checkpoint(folder / "checkpoint"), storages("4w", 32, "8w"))
    export(source, folder / "program", ExportOptions(max_seq_len=60, draft_tokens=2))
    return folder / "program"


def test_outputs_of_python(program: Path) -> None:
    """A request whose tokens the engine draws itself has no drafts."""
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    penalised = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, min_p=0.1)
    with LLM(program, max_sequences=2) as llm:
        with_drafts, without = (
            request.outputs[0] for request in llm.generate([[1, 2, 3]] * 2, [params, penalised])
        )
    assert without.drafts == Drafts()
    drafts = with_drafts.drafts
    # Without drafts are the prompt, the step behind it, and perhaps the last one.
    assert len(with_drafts.token_ids) == 20
    assert 20 - drafts.steps - sum(drafts.accepted) in (2, 3)
    assert drafts.steps < drafts.tokens <= 2 * drafts.steps and len(drafts.accepted) == 2
