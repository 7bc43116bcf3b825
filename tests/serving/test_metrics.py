"""Metrics for those who read them otherwise than as text."""

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from et_moe.serving.interface import Drafts, EngineStatus
from et_moe.serving.metrics import Metrics


def test_samples_are_those_of_the_text() -> None:
    """But for the times at which counters began. Samples of one name have the same labels."""
    metrics = Metrics(lambda: EngineStatus(3, 2, 8, 10, 4, 1, None))
    metrics.tokens(3, 0.2, first=True)
    metrics.tokens(2, 0.1, first=False)
    metrics.drafts(Drafts(4, 8, (3, 1)))
    metrics.finished("stop", 2.0)
    metrics.finished("length", 200.0)
    metrics.rejected(429)
    labels, found = defaultdict(set), []
    for sample, text in metrics.samples():
        labels[sample.name].add(frozenset(sample.labels))
        found.append((sample.name, sample.labels, sample.value))
        assert text
    assert all(len(sets) == 1 for sets in labels.values())
    assert ("et_moe_requests_running", {}, 2) in found
    assert ("et_moe_request_seconds_bucket", {"le": "+Inf"}, 2) in found
    assert ("et_moe_requests_total", {"finish_reason": "stop"}, 1) in found
    expected = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
