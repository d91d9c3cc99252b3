"""Every series the controller exports: name, unit, labels and meaning, in one place.

Knows nothing of who measures. Labels stay low in number: a function label is always the name of a
deployed function or empty, never what a client typed.
"""

from collections.abc import Mapping, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from controller.scaling.generation import GenerationRecord

CONTENT_TYPE = CONTENT_TYPE_LATEST

REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
FIRST_TOKEN_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PHASE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)


class Metrics:
    """The controller's series in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, labels, namespace="coldspark", registry=registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(name, meaning, labels, namespace="coldspark", registry=registry)

        def histogram(
            name: str, meaning: str, *labels: str, buckets: tuple[float, ...]
        ) -> Histogram:
            return Histogram(
                name, meaning, labels, namespace="coldspark", registry=registry, buckets=buckets
            )

        self._requests = counter(
            "requests_total",
            "Calls of the OpenAI API by final status; 499 when the client went away.",
            *("function", "code", "cold"),
        )
        self._request_duration = histogram(
            "request_duration_seconds",
            "From the request's head to the last byte of its answer.",
            "function",
            buckets=REQUEST_BUCKETS_S,
        )
        self._queue = histogram(
            "request_queue_seconds",
            "From admission to a lease on a ready replica.",
            *("function", "cold"),
            buckets=FIRST_TOKEN_BUCKETS_S,
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From admission to the first token.",
            *("function", "cold"),
            buckets=FIRST_TOKEN_BUCKETS_S,
        )
        self._inter_token = histogram(
            "inter_token_seconds",
            "Between tokens of one sequence; tokens that arrive together share their gap.",
            "function",
            buckets=TOKEN_BUCKETS_S,
        )
        self._tokens = counter(
            "tokens_total",
            "Tokens by direction: prompt, cached (the part of prompt not computed), output.",
            *("function", "direction"),
        )
        self._in_flight = gauge(
            "requests_in_flight", "Sequences that hold a lease on a replica.", "function"
        )
        self._queued = gauge("requests_queued", "Sequences that wait for a replica.", "function")
        self._disconnects = counter(
            "client_disconnects_total",
            "Clients gone before the end, by phase: waiting (nothing sent yet) or streaming.",
            *("function", "phase"),
        )
        self._cold_starts = counter(
            "cold_starts_total",
            "Activations of a replica, by the tier they started from and their outcome.",
            *("function", "from_tier", "outcome"),
        )
        self._cold_start = histogram(
            "cold_start_seconds",
            "Whole time of a successful activation.",
            *("function", "from_tier"),
            buckets=PHASE_BUCKETS_S,
        )
        self._cold_start_phase = histogram(
            "cold_start_phase_seconds",
            "Time of one phase of an activation.",
            *("function", "phase"),
            buckets=PHASE_BUCKETS_S,
        )
        self._replicas = gauge("replicas", "Replicas by lifecycle state.", *("function", "state"))
        self._standbys = gauge(
            "standbys", "Runtimes without a model by state: ready, starting.", *("backend", "state")
        )
        self._starts = gauge(
            "starts",
            "Starts of replicas and standbys by state: under_way, waiting; limit is the most.",
            "state",
        )
        self._host_memory = gauge(
            "host_memory_bytes",
            "Host memory that only runtimes hold, by state; standbys are of no function.",
            *("function", "state"),
        )
        self._reaped = counter(
            "reaped_total",
            "Replicas moved down for being idle, by the tier they went to.",
            *("function", "to_tier"),
        )
        self._crashes = counter(
            "runtime_crashes_total", "Runtimes that went away unasked.", "function"
        )
        self._engine_requests = gauge(
            "engine_requests",
            "Sequences inside the engines by state: running holds KV blocks, waiting has none yet.",
            *("function", "state"),
        )
        self._engine_kv_usage = gauge(
            "engine_kv_cache_usage_ratio",
            "Share of the engines' KV blocks in use; blocks that only cache prefixes are free.",
            "function",
        )
        self._engine_events = {
            "num_preemptions": counter(
                "engine_preemptions_total",
                "Sequences that gave up their KV blocks to others and were computed again.",
                "function",
            ),
            "num_prompt_tokens": counter(
                "engine_prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
                "function",
            ),
            "num_cached_prompt_tokens": counter(
                "engine_prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache.",
                "function",
            ),
            "num_output_tokens": counter(
                "engine_generation_tokens_total",
                "Tokens generated, those that nobody read included.",
                "function",
            ),
            "num_steps": counter("engine_steps_total", "Batches run.", "function"),
            "num_late_compilations": counter(
                "engine_late_compilations_total",
                "Kernels compiled while requests could wait for them; more than 0 is a defect.",
                "function",
            ),
        }
        self._start_compilations = counter(
            "start_compilations_total",
            "Kernels compiled by starts; none with a complete profile in the snapshot.",
            "function",
        )
        self._foreign_memory = gauge(
            "device_foreign_bytes",
            "GPU memory held by processes that are not Coldspark's; absent when not known.",
            "device",
        )
        self._gpu_seconds = counter(
            "gpu_seconds_total",
            "Device-seconds by ledger state; the function is empty when nobody holds the device.",
            *("function", "state"),
        )

        self._journal_dropped = counter(
            "journal_dropped_total",
            "Requests, cold starts and transitions never written: the database was away too long.",
        )

    def request_finished(self, *, function: str, code: int, is_cold: bool, seconds: float) -> None:
        """Count one call of the OpenAI API; the function is empty when none was resolved."""
        self._requests.labels(function, str(code), _flag(is_cold)).inc()
        self._request_duration.labels(function).observe(seconds)

    def generation_finished(self, record: GenerationRecord) -> None:
        """Take the queue, first-token and token figures of one sequence that is over."""
        cold = _flag(record.tier != "ready")
        if record.queue_s is not None:
            self._queue.labels(record.function, cold).observe(record.queue_s)
        if record.first_token_s is not None:
            self._first_token.labels(record.function, cold).observe(record.first_token_s)
            self._tokens.labels(record.function, "prompt").inc(record.num_prompt_tokens)
            self._tokens.labels(record.function, "cached").inc(record.num_cached_tokens)
            self._tokens.labels(record.function, "output").inc(record.num_output_tokens)

    def inter_token(self, function: str) -> Histogram:
        """Return the histogram to observe token gaps in, looked up once a sequence."""
        return self._inter_token.labels(function)

    def client_disconnected(self, *, function: str, phase: str) -> None:
        """Count a client that left while `waiting` or `streaming`."""
        self._disconnects.labels(function, phase).inc()

    def set_load(self, function: str, *, in_flight: int, queued: int) -> None:
        """Set how many sequences run and wait now."""
        self._in_flight.labels(function).set(in_flight)
        self._queued.labels(function).set(queued)

    def cold_start_finished(
        self,
        *,
        function: str,
        from_tier: str,
        outcome: str,
        seconds: float,
        phases: Mapping[str, float],
    ) -> None:
        """Count one activation; only a successful one, outcome `ready`, counts as a duration."""
        self._cold_starts.labels(function, from_tier, outcome).inc()
        if outcome == "ready":
            self._cold_start.labels(function, from_tier).observe(seconds)
        for phase, phase_s in phases.items():
            self._cold_start_phase.labels(function, phase).observe(phase_s)

    def set_replicas(self, function: str, counts: Mapping[str, int]) -> None:
        """Set the number of replicas in each state; a state left out has none."""
        self._replicas.remove_by_labels({"function": function})
        for state, count in counts.items():
            self._replicas.labels(function, state).set(count)

    def set_standbys(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Set the number of standbys in each state, by backend."""
        for backend, by_state in counts.items():
            for state, count in by_state.items():
                self._standbys.labels(backend, state).set(count)

    def set_starts(self, counts: Mapping[str, int]) -> None:
        """Set how many starts are under way and waiting, and the limit."""
        for state, count in counts.items():
            self._starts.labels(state).set(count)

    def set_host_memory(self, held: Mapping[str, Mapping[str, int]]) -> None:
        """Set what the replicas of each function hold of the host's memory, by state."""
        self._host_memory.clear()
        for function, by_state in held.items():
            for state, num_bytes in by_state.items():
                self._host_memory.labels(function, state).set(num_bytes)

    def replica_reaped(self, *, function: str, to_tier: str) -> None:
        """Count a replica that was moved down because it was idle."""
        self._reaped.labels(function, to_tier).inc()

    def engine_started(self, *, function: str, num_compilations: int) -> None:
        """Count what an engine had to compile to start."""
        self._start_compilations.labels(function).inc(num_compilations)

    def runtime_crashed(self, function: str) -> None:
        """Count a runtime that went away unasked."""
        self._crashes.labels(function).inc()

    def set_engine_load(
        self, function: str, *, running: int, waiting: int, kv_usage: float
    ) -> None:
        """Set what the engines of a function hold now."""
        self._engine_requests.labels(function, "running").set(running)
        self._engine_requests.labels(function, "waiting").set(waiting)
        self._engine_kv_usage.labels(function).set(kv_usage)

    def add_engine_events(self, function: str, counts: Mapping[str, int]) -> None:
        """Count what engines did, under the names of the wire's LoadFigures."""
        for name, count in counts.items():
            self._engine_events[name].labels(function).inc(count)

    @property
    def engine_events(self) -> Sequence[str]:
        """The counts that `add_engine_events` takes."""
        return tuple(self._engine_events)

    def set_foreign_memory(self, device: str, num_bytes: int | None) -> None:
        """Set what others hold of a GPU; None when it is not known."""
        if num_bytes is None:
            self._foreign_memory.remove_by_labels({"device": device})
        else:
            self._foreign_memory.labels(device).set(num_bytes)

    def add_gpu_seconds(self, *, function: str, state: str, seconds: float) -> None:
        """Add device-seconds that have passed."""
        self._gpu_seconds.labels(function, state).inc(seconds)

    def journal_entry_dropped(self) -> None:
        """Count an entry that the journal had no room for."""
        self._journal_dropped.inc()

    def forget(self, function: str) -> None:
        """Drop the gauges of a deleted function; its counters stay, as Prometheus wants."""
        gauges = (
            self._in_flight,
            self._queued,
            self._replicas,
            self._engine_requests,
            self._engine_kv_usage,
        )
        for gauge in gauges:
            gauge.remove_by_labels({"function": function})

    def render(self) -> bytes:
        """Return all series in Prometheus' text format, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


def _flag(value: bool) -> str:
    return "true" if value else "false"
