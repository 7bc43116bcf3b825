"""Metrics for those who read them otherwise than as text."""

import asyncio
import importlib
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import ClassVar

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


class RayGauge:
    """Stands for Ray's, which is not installed where these tests run. The first one fails."""

    made = 0
    values: ClassVar[dict[tuple, float]] = {}

    def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        RayGauge.made += 1
        if RayGauge.made == 1:
            raise RuntimeError("no agent yet")

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values[self.name, *tags.values()] = value


def test_a_failure_does_not_end_the_export_to_ray(monkeypatch, caplog) -> None:
    for name in ("ray", "ray.serve", "ray.serve.metrics"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Gauge=RayGauge))
    monkeypatch.delitem(sys.modules, "et_moe.serving.ray_metrics", raising=False)
    module = importlib.import_module("et_moe.serving.ray_metrics")
    monkeypatch.setitem(sys.modules, "et_moe.serving.ray_metrics", module)
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    metrics = Metrics(lambda: EngineStatus(3, 2, 8, 10, 4, 1, None))
    metrics.finished("stop", 2.0)

    async def run() -> None:
        task = asyncio.ensure_future(module.export(metrics))
        while not task.done() and ("et_moe_requests_total", "stop") not in RayGauge.values:
            await asyncio.sleep(0)
        assert not task.done(), task.exception()
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert RayGauge.values["et_moe_requests_running",] == 2
    [record] = caplog.records
    assert "could not be given to Ray" in record.message and "no agent yet" in caplog.text
