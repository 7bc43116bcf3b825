"""What a server measures, for Prometheus, with names and units as its documentation asks
(https://prometheus.io/docs/practices/naming)."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.samples import Sample

from et_moe.serving.interface import Drafts, EngineStatus

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters and histograms of one server.

    Args:
        status: the engine's state, asked when the metrics are read.
    """

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[EngineStatus], float]) -> None:
            Gauge(name, text, registry=registry).set_function(lambda: value(status()))

        gauge("et_moe_requests_waiting", "Requests in the queue.", lambda s: s.waiting)
        gauge("et_moe_requests_running", "Requests that have a place.", lambda s: s.running)
        gauge("et_moe_requests_running_max", "Places for requests.", lambda s: s.max_sequences)
        gauge("et_moe_kv_cache_pages", "Pages of the KV cache.", lambda s: s.pages)
        gauge("et_moe_kv_cache_pages_free", "Those that are free.", lambda s: s.free_pages)
        gauge("et_moe_preemptions", "Sequences put back as pages ran out.", lambda s: s.preemptions)
        gauge("et_moe_engine_up", "0 once the device is broken.", lambda s: s.broken is None)
        self._requests = Counter(
            "et_moe_requests", "Sequences that have ended.", ["finish_reason"], registry=registry
        )
        self._rejected = Counter(
            "et_moe_requests_rejected", "Requests that were refused.", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "et_moe_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.cached_tokens = Counter(
            "et_moe_prompt_tokens_cached", "Those taken from the prefix cache.", registry=registry
        )
        self._generated = Counter(
            "et_moe_generated_tokens", "Tokens that were drawn.", registry=registry
        )
        self._draft_steps = Counter(
            "et_moe_draft_steps", "Decode calls of a sequence with drafts.", registry=registry
        )
        self._draft_tokens = Counter(
            "et_moe_draft_tokens", "Drafts that were fed.", registry=registry
        )
        self._accepted = Counter(
            "et_moe_accepted_draft_tokens", "Those accepted.", ["position"], registry=registry
        )
        self._first = self._histogram("time_to_first_token", "From the request to its first token.")
        self._between = self._histogram("time_between_tokens", "From a token to the next.")
        self._duration = self._histogram("request", "From the request to its end.")

    def _histogram(self, name: str, text: str) -> Histogram:
        name = f"et_moe_{name}_seconds"
        return Histogram(name, text, buckets=_SECONDS, registry=self._registry)

    def tokens(self, count: int, seconds: float, first: bool) -> None:
        """`count` tokens were drawn by one call, `seconds` after the last ones or the request."""
        self._generated.inc(count)
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def drafts(self, drafts: Drafts) -> None:
        """What became of drafts."""
        self._draft_steps.inc(drafts.steps)
        self._draft_tokens.inc(drafts.tokens)
        for position, count in enumerate(drafts.accepted):
            self._accepted.labels(str(position)).inc(count)

    def finished(self, reason: str, seconds: float) -> None:
        self._requests.labels(reason).inc()
        self._duration.observe(seconds)

    def rejected(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()

    def samples(self) -> Iterator[tuple[Sample, str]]:
        """All samples that `text` has, each with what it is in words. Those of one name have the
        same labels. Without the times at which counters began."""
        for family in self._registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    yield sample, family.documentation

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
