"""What a replica measures, for Ray's own metrics."""

import asyncio
import logging

from ray.serve.metrics import Gauge

from et_moe.serving.metrics import Metrics

logger = logging.getLogger("et_moe.serving")

_SECONDS = 2.0
"""Between two looks at the metrics: less than the time after which Ray drops a gauge that nobody
has set, twice its `metrics_report_interval_ms`, which is 10 s."""


async def export(metrics: Metrics) -> None:
    """Gives a replica's metrics to Ray, again and again until it is cancelled. Ray names the
    replica, adds `ray_` in front, and serves those of a machine at its metrics port.

    They are gauges there, counters and the parts of histograms too: what they hold is what
    prometheus_client has counted. Ray's own counters and histograms would be called for each token,
    and its histograms forget the values, so that sums are wrong. A failure is logged, and the next
    look may succeed.
    """
    gauges: dict[str, Gauge] = {}
    while True:
        try:
            _set(metrics, gauges)
        except Exception:
            logger.exception("metrics could not be given to Ray, to be tried again")
        await asyncio.sleep(_SECONDS)


def _set(metrics: Metrics, gauges: dict[str, Gauge]) -> None:
    for sample, text in metrics.samples():
        if sample.name not in gauges:
            gauges[sample.name] = Gauge(sample.name, text, tuple(sample.labels))
        gauges[sample.name].set(sample.value, dict(sample.labels))
