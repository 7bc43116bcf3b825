"""What a replica measures, for Ray's own metrics."""

import asyncio

from ray.serve.metrics import Gauge

from et_moe.serving.metrics import Metrics

_SECONDS = 2.0
"""Between two looks at the metrics: less than the time after which Ray drops a gauge that nobody
has set, twice its `metrics_report_interval_ms`, which is 10 s."""


async def export(metrics: Metrics) -> None:
    """Gives a replica's metrics to Ray, again and again until it is cancelled. Ray names the
    replica, adds `ray_` in front, and serves those of a machine at its metrics port.

    They are gauges there, counters and the parts of histograms too: what they hold is what
    prometheus_client has counted. Ray's own counters and histograms would be called for each token,
    and its histograms forget the values, so that sums are wrong.
    """
    gauges: dict[str, Gauge] = {}
    while True:
        for sample, text in metrics.samples():
            if sample.name not in gauges:
                gauges[sample.name] = Gauge(sample.name, text, tuple(sample.labels))
            gauges[sample.name].set(sample.value, dict(sample.labels))
        await asyncio.sleep(_SECONDS)
