"""What the server counts, under the names that vLLM has for it, so that its dashboards work.

Source of names and labels: vLLM's documentation of its production metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from pyllama_dist.engine.engine import Load
from pyllama_dist.engine.sequence import Timings
from pyllama_dist.net.messages import Usage

# A cluster of small machines takes from some milliseconds to many minutes.
_SECONDS = (0.01, 0.03, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class NodeUse:
    """What steps have cost a node so far."""

    name: str
    compute_seconds: float
    sync_seconds: float
    bytes_moved: int
    peak_bytes: int

    @classmethod
    def of(cls, name: str, usage: Usage) -> "NodeUse":
        """A worker's."""
        spent = usage.compute_seconds, usage.sync_seconds, usage.bytes_moved
        return cls(name, *spent, usage.peak_bytes)


class Metrics:
    """Counters, gauges and histograms of one model."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry, self._model = CollectorRegistry(), model
        self._running = self._gauge("vllm:num_requests_running", "Sequences that run.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait.")
        self._kv = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Tokens looked for in cache.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the cache.")
        self._preempted = self._counter("vllm:num_preemptions", "Sequences that were preempted.")
        self._ended = self._counter(
            "vllm:request_success", "Requests, by their end.", "finished_reason"
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Until the first token.")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens.")
        self._each = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time of a request's tokens."
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "A whole request.")
        self._queued = self._histogram("vllm:request_queue_time_seconds", "Before the first step.")
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Of the prompt.")
        self._decode = self._histogram("vllm:request_decode_time_seconds", "Of further tokens.")
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Of both.")
        self._prompts = self._histogram("vllm:request_prompt_tokens", "Of a request.", _TOKENS)
        self._answers = self._histogram("vllm:request_generation_tokens", "Of a request.", _TOKENS)
        self._rows = self._histogram("vllm:iteration_tokens_total", "Rows of a step.", _TOKENS)
        self._step = self._histogram("pyllama_dist_step_seconds", "Of a step.")
        self._steps = self._counter("pyllama_dist_steps", "Steps.")
        self._http = Counter(
            "http_requests",
            "Answers, by route.",
            ("handler", "method", "status"),
            registry=self._registry,
        )
        self._nodes = {
            name: self._gauge(f"pyllama_dist_node_{name}", help_, "node")
            for name, help_ in (
                ("compute_seconds_total", "Computing, by node."),
                ("sync_seconds_total", "Exchanging, waiting for others included."),
                ("bytes_total", "Sent and received."),
                ("peak_bytes", "Most memory taken."),
            )
        }
        self._info = Gauge(
            "pyllama_dist_build_info",
            "What runs.",
            ("version", "model", "nodes", "kernels"),
            registry=self._registry,
        )

    def describe(self, version: str, nodes: int, kernels: str) -> None:
        """Says what runs."""
        self._info.labels(version, self._model, str(nodes), kernels).set(1)

    def step(self, rows: int, seconds: float) -> None:
        """A step has run."""
        self._rows.observe(rows)
        self._step.observe(seconds)
        self._steps.inc()

    def token(self, seconds: float) -> None:
        """So long after the one before."""
        self._between.observe(seconds)

    def first(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""
        self._first.observe(seconds)

    def ended(self, reason: str, timings: Sequence[Timings], seconds: float) -> None:
        """A request has ended, with `stop`, `length`, `tool_calls` or `abort`."""
        self._ended.labels(self._model, reason).inc()
        self._whole.observe(seconds)
        for one in timings:
            self._prompt.inc(one.prompt_tokens)
            self._generated.inc(one.generated_tokens)
            self._queries.inc(one.prompt_tokens)
            self._hits.inc(one.cached_tokens)
            self._preempted.inc(one.preemptions)
            self._queued.observe(one.waiting_seconds)
            self._prefill.observe(one.prefill_seconds)
            self._decode.observe(one.decode_seconds)
            self._inference.observe(one.prefill_seconds + one.decode_seconds)
            self._prompts.observe(one.prompt_tokens)
            self._answers.observe(one.generated_tokens)
            if one.generated_tokens > 1:
                self._each.observe(one.decode_seconds / (one.generated_tokens - 1))

    def http(self, handler: str, method: str, status: int) -> None:
        """A request to a route was answered."""
        self._http.labels(handler, method, str(status)).inc()

    def text(self, load: Load | None, nodes: Sequence[NodeUse]) -> bytes:
        """All of it, in Prometheus' text format 0.0.4."""
        if load is not None:
            self._running.set(load.running)
            self._waiting.set(load.waiting)
            self._kv.set(load.kv_used)
        for node in nodes:
            values = node.compute_seconds, node.sync_seconds, node.bytes_moved, node.peak_bytes
            for gauge, value in zip(self._nodes.values(), values, strict=True):
                gauge.labels(self._model, node.name).set(value)
        return generate_latest(self._registry)

    def _gauge(self, name: str, help_: str, *labels: str) -> Gauge:
        gauge = Gauge(name, help_, ("model_name", *labels), registry=self._registry)
        return gauge if labels else gauge.labels(self._model)

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        counter = Counter(name, help_, ("model_name", *labels), registry=self._registry)
        return counter if labels else counter.labels(self._model)

    def _histogram(self, name: str, help_: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        found = Histogram(name, help_, ("model_name",), buckets=buckets, registry=self._registry)
        return found.labels(self._model)
