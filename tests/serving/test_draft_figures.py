"""What callers are told of drafts: events, outputs of Python, metrics and usage."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_small, storages

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.serving.engine import load_engine
from et_moe.serving.interface import Drafts, EngineStatus, Event
from et_moe.serving.llm import LLM, SamplingParams
from et_moe.serving.metrics import Metrics
from et_moe.serving.openai.events import usage
from et_moe.serving.steps import Steps


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


@pytest.mark.parametrize(("count", "accepted"), [(1, (1, 0)), (2, (1, 1)), (3, (1, 1))])
def test_an_answer_has_the_drafts_of_its_tokens(tokenizer, count: int, accepted: tuple) -> None:
    """A call that accepted two drafts drew three tokens, of which the answer has so many."""
    steps = Steps(tokenizer)
    assert len(list(steps.of(Event(1, (5,))))) == 1
    for i, _ in enumerate(steps.of(Event(1, (6, 7, 8), drafts=Drafts(1, 2, (1, 1)))), 1):
        if i == count:
            steps.end()
    assert list(steps.of(Event(1, (9, 9), drafts=Drafts(1, 2, (1, 0))))) == []
    assert steps.tokens == 1 + count and steps.drafts == Drafts(1, 2, accepted)


def test_drafts_with_a_stop_string(program: Path, monkeypatch) -> None:
    """Answers end with the token that completes it, with drafts and without, for a reader who
    takes each event, and for one who comes late."""
    whole = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    with LLM(program, max_sequences=2) as llm:
        ids = llm.generate([[1, 2, 3]], SamplingParams(**whole))[0].outputs[0].token_ids
        texts = [llm.tokenizer.id_to_bytes(i).decode(errors="replace") for i in ids]
        at = next(i for i in range(9, 40) if texts[i].strip() and texts[i] not in texts[:i])
        found, wait = [], llm._wait
        for seconds, bias in ((0.0, {}), (0.2, {}), (0.0, {"min_p": 1e-9})):
            monkeypatch.setattr(llm, "_wait", lambda s=seconds: [time.sleep(s), wait()][1])
            params = SamplingParams(**whole, **bias, stop=texts[at])
            found += llm.generate([[1, 2, 3]], params)[0].outputs
    assert [output.token_ids for output in found] == [ids[: at + 1]] * 3
    fast, slow, without = (output.drafts for output in found)
    assert fast == slow != without == Drafts()


def test_a_call_with_drafts_has_an_event_of_its_own(program: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    engine = load_engine(program)
    begin = time.monotonic()
    engine.submit([1, 2, 3], params)
    time.sleep(0.1)
    while engine.status().running + engine.status().waiting:
        time.sleep(0.01)
    events = engine.take_events()
    assert len(events) > 10 and events[-1].finish_reason == "length"
    assert sum(len(event.token_ids) for event in events) == 40
    for event in events:
        accepted = sum(event.drafts.accepted)
        assert event.drafts.steps <= 1
        assert not event.drafts.steps or len(event.token_ids) in (accepted, accepted + 1)
        assert len(event.drawn) == len(event.token_ids)
        assert not event.drafts.steps or len(set(event.drawn)) == 1
    moments = [begin, *(moment for event in events for moment in event.drawn), time.monotonic()]
    assert moments == sorted(moments)
    engine.close()


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
