"""What a function is: the spec a user writes, validated and frozen.

Knows types, bounds and the rules between fields. Reading YAML and explaining mistakes is
functions.loader's; what the values lead to is the controller's.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from functions.cron import CronFields, parse_cron
from functions.units import DURATION_PATTERN, SIZE_PATTERN, parse_duration, parse_size

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
SERVED_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$"
MINUTE, HOUR = 60.0, 3_600.0
MIB, GIB = 1 << 20, 1 << 30

_WEBHOOK_PREFIX = re.compile(
    r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[1-9][0-9]{0,4})?(/[\w.~!$&'()*+,;=:%-]*)*",
    re.ASCII,
)
_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"{_HUB_PART}/{_HUB_PART}(@[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}})?", re.ASCII)


def _price(value: Decimal) -> str:
    return format(value.normalize(), "f")


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # True equals 1, so a Literal would take it
        raise ValueError("must be a number")
    return value


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": DURATION_PATTERN},
            ],
            "x-coldspark-type": "duration",
        }
    ),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": SIZE_PATTERN},
            ],
            "x-coldspark-type": "size",
        }
    ),
]
Count = Annotated[int, Strict()]
_NotBool = BeforeValidator(_refuse_bool)
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Switch = Annotated[bool, Strict()]
Price = Annotated[
    Decimal,
    Field(ge=0, le=100_000, allow_inf_nan=False),
    PlainSerializer(_price, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 100_000},
                {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
            ]
        }
    ),
]
ServedName = Annotated[str, Field(pattern=SERVED_NAME_PATTERN)]


class SourceKind(StrEnum):
    """Where a model comes from."""

    HUB = "hub"
    DIRECTORY = "directory"
    GGUF = "gguf"


class ParkMode(StrEnum):
    """How much of a GPU a replica gives back when it is parked."""

    DEEP = "deep"
    LIGHT = "light"


class ColdPolicy(StrEnum):
    """What happens to a request that finds no ready replica."""

    HOLD = "hold"
    REJECT = "reject"


class Task(StrEnum):
    """What a function's answers are."""

    AUTO = "auto"
    GENERATE = "generate"
    EMBED = "embed"


class PoolingMode(StrEnum):
    """How the vectors of a text's tokens become one."""

    AUTO = "auto"
    MEAN = "mean"
    CLS = "cls"
    LAST = "last"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Section):
    """The weights and the names they answer to."""

    source: str = Field(
        min_length=1,
        max_length=4096,
        description="Hub id `org/name[@revision]`, a local directory, or a `.gguf` file. Paths "
        "start with `/`, `./`, `../` or `~/`, or end in `.gguf`; relative ones start at the "
        "YAML file's directory.",
    )
    served_names: tuple[ServedName, ...] = Field(
        default=(),
        max_length=16,
        description="Model ids clients may use; empty means the function's name.",
    )
    max_model_len: Count | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="Longest prompt plus output in tokens; null takes the model's own limit.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Type of the weights; auto takes the checkpoint's."
    )
    task: Task = Field(
        default=Task.AUTO,
        description="`generate` text, or `embed` it; auto embeds with encoders and with models "
        "whose author says how to pool.",
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="Whether sampling fields that a request leaves out take the values of the "
        "model's generation_config.json, or OpenAI's defaults.",
    )
    tool_call_parser: Literal[
        "auto", "hermes", "llama3_json", "mistral", "pythonic", "deepseek"
    ] = Field(
        default="auto",
        description="Format that the model writes tool calls in; auto goes by its chat template, "
        "and takes `hermes` where that says nothing.",
    )
    reasoning_parser: Literal["auto", "think", "none"] = Field(
        default="auto",
        description="Whether the model thinks between `<think>` and `</think>`, which answers carry "
        "apart; auto goes by its chat template.",
    )
    quantization: None = Field(
        default=None,
        description="Only null in this version: weights are served in `dtype`.",
    )

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        if any(not character.isprintable() for character in source):
            raise ValueError("must not contain control characters")
        if not is_local_source(source) and not _HUB_ID.fullmatch(source):
            raise ValueError(
                "must be a hub id such as Qwen/Qwen3-8B or Qwen/Qwen3-8B@main, or a path starting with "
                "./, ../, ~/ or /"
            )
        return source

    @property
    def kind(self) -> SourceKind:
        """What `source` denotes, from its spelling alone."""
        if not is_local_source(self.source):
            return SourceKind.HUB
        return SourceKind.GGUF if self.source.endswith(".gguf") else SourceKind.DIRECTORY

    @property
    def location(self) -> str:
        """`source` without a hub revision."""
        return self.source.partition("@")[0] if self.kind is SourceKind.HUB else self.source

    @property
    def revision(self) -> str | None:
        """The hub revision after `@`; None for the default branch and for paths."""
        return self.source.partition("@")[2] or None if self.kind is SourceKind.HUB else None


def is_local_source(source: str) -> bool:
    """Return whether `source` is spelled as a path rather than as a hub id."""
    return source.startswith(("/", "./", "../", "~/")) or source.endswith(".gguf")


class PoolingSpec(_Section):
    """How a function that embeds makes a vector; left out, as the model's author says."""

    mode: PoolingMode = Field(
        default=PoolingMode.AUTO,
        description="Of the last layer's vectors, take the `mean`, the first one (`cls`) or the "
        "`last`; where the author says nothing, auto takes the mean of an encoder's and the last "
        "of a decoder's.",
    )
    normalize: Switch | None = Field(
        default=None, description="Scale vectors to length 1; null as the author says, else true."
    )
    dimensions: tuple[Annotated[Count, Field(ge=1)], ...] | None = Field(
        default=None,
        max_length=64,
        description="Smaller sizes that callers may ask for; only right for a model that was "
        "trained so. Null takes what the checkpoint says, which is mostly none.",
    )


class EngineSpec(_Section):
    """Limits of one engine, under vLLM's names."""

    max_num_seqs: Count = Field(default=256, ge=1, le=4096, description="Sequences in one batch.")
    max_num_batched_tokens: Count = Field(
        default=8192, ge=1, le=1 << 20, description="Token budget of one engine step."
    )
    gpu_memory_utilization: Number = Field(
        default=0.90, gt=0, le=1, description="Share of a GPU's memory the engine may use."
    )
    kv_cache_memory_bytes: Size | None = Field(
        default=None,
        description="Size of the KV cache; null derives it from the memory limits.",
    )
    tensor_parallel_size: Annotated[Literal[1, 2, 4, 8], _NotBool] = Field(
        default=1, description="GPUs one replica is spread over; must match resources.gpus."
    )
    enable_prefix_caching: Switch = Field(
        default=True, description="Reuse KV blocks between sequences with a common prefix."
    )
    block_size: Annotated[Literal[8, 16, 32, 64, 128], _NotBool] | None = Field(
        default=None,
        description="Tokens in one KV block; null takes what is fastest: 64 on a GPU, else 16.",
    )


class ResourceSpec(_Section):
    """What one replica gets."""

    gpus: Annotated[Literal[0, 1, 2, 4, 8], _NotBool] = Field(
        default=1, description="GPUs of a replica; 0 runs the engine on the CPU."
    )
    cpu: Number | None = Field(
        default=None, gt=0, le=4096, description="CPU cores; null for no limit."
    )
    memory: Size | None = Field(
        default=None,
        description="Host memory; null for no limit. On the CPU it is promised to one replica alone.",
    )


class ScalingSpec(_Section):
    """How many replicas exist, and for how long."""

    min_replicas: Count = Field(
        default=0, ge=0, le=64, description="Replicas kept ready; 0 lets the function go to zero."
    )
    max_replicas: Count = Field(default=2, ge=1, le=64, description="Most replicas at once.")
    idle_timeout: Duration | None = Field(
        default=5 * MINUTE,
        description="From the last byte of the last response until a ready replica is parked; "
        "0 parks at once, null never.",
    )
    park_timeout: Duration | None = Field(
        default=HOUR,
        description="From parking until the replica is stopped; 0 stops at once, null never.",
    )
    park: ParkMode = Field(
        default=ParkMode.DEEP,
        description="What a parked replica leaves on its GPU: `deep` next to nothing, where the "
        "driver can do that, `light` context and CUDA graphs, for a faster wake.",
    )
    target_concurrency: Count = Field(
        default=32, ge=1, le=4096, description="Requests a replica should carry (autoscaler)."
    )
    max_concurrency: Count = Field(
        default=256, ge=1, le=4096, description="Requests a replica may carry at once."
    )
    scale_down_delay: Duration = Field(
        default=60.0,
        description="How long demand must stay lower before a replica is given up; 0 for at once.",
    )


class ScheduleSpec(_Section):
    """A window in which replicas are kept ready."""

    cron: str = Field(
        max_length=200,
        description="When the window opens: minute hour day month weekday; Sunday is 0 or 7.",
    )
    timezone: str = Field(
        default="UTC", max_length=64, description="IANA time zone of `cron`, e.g. Europe/Berlin."
    )
    min_replicas: Count = Field(
        default=1, ge=1, le=64, description="Replicas kept ready in the window."
    )
    duration: Duration = Field(description="Length of the window; over 0.")

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str) -> str:
        parse_cron(cron)
        return " ".join(cron.split())

    @field_validator("timezone")
    @classmethod
    def _check_timezone(cls, timezone: str) -> str:
        try:
            return ZoneInfo(timezone).key
        except (OSError, ValueError, KeyError) as error:
            raise ValueError("must be an IANA time zone such as UTC or Europe/Berlin") from error

    @field_validator("duration")
    @classmethod
    def _check_duration(cls, duration: float) -> float:
        return _positive(duration)

    @property
    def fields(self) -> CronFields:
        """The cron fields with weekdays as names, for a scheduler."""
        return parse_cron(self.cron)


class QueueSpec(_Section):
    """The bounded queue in front of the replicas."""

    max_requests: Count = Field(
        default=1000, ge=1, le=1_000_000, description="Most requests waiting; more get 429."
    )
    max_bytes: Size = Field(
        default=256 * MIB, description="Most bytes of request bodies waiting; more get 429."
    )
    timeout: Duration = Field(
        default=10 * MINUTE,
        description="Longest wait for a replica, then 504; 0 waits for nothing.",
    )
    on_cold: ColdPolicy = Field(
        default=ColdPolicy.HOLD,
        description="With no ready replica: `hold` the request, or `reject` it with 503 and "
        "Retry-After while a replica is woken.",
    )


class TimeoutSpec(_Section):
    """Limits on the steps of one request and of one replica."""

    startup: Duration = Field(
        default=15 * MINUTE, description="From starting a replica until it is ready; over 0."
    )
    first_token: Duration = Field(
        default=2 * MINUTE, description="From handing a request over to its first token; over 0."
    )
    stream_idle: Duration = Field(
        default=60.0, description="Between two tokens of one response; over 0."
    )
    drain: Duration = Field(
        default=5 * MINUTE,
        description="Time running requests get when a replica is given up; 0 cuts them off.",
    )

    @field_validator("startup", "first_token", "stream_idle")
    @classmethod
    def _check_positive(cls, duration: float) -> float:
        return _positive(duration)


class WebhookSpec(_Section):
    """Who may be told of answers to asynchronous requests."""

    allow: tuple[Annotated[str, Field(max_length=2048)], ...] = Field(
        default=(),
        max_length=64,
        description="URLs that webhooks may go to, each with all that is below it, such as "
        "`https://hooks.example.com/answers/`; empty for none.",
    )
    allow_private_addresses: Switch = Field(
        default=False,
        description="Also send to hosts with addresses that are not public, such as this machine.",
    )

    @field_validator("allow")
    @classmethod
    def _check_allow(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for url in allow:
            if not _WEBHOOK_PREFIX.fullmatch(url):
                raise ValueError(
                    "must be URLs such as https://hooks.example.com/answers/, without user, query "
                    f"or fragment, got {url!r}"
                )
        return allow


class CostSpec(_Section):
    """What a device costs."""

    gpu_hour_usd: Price | None = Field(
        default=None, description="Price of one device-hour; null takes the node's price."
    )


class FunctionSpec(_Section):
    """One deployed model: what it is, what it may use, when it exists."""

    name: str = Field(
        pattern=NAME_PATTERN,
        description="Identity of the function: 1 to 63 of a-z, 0-9 and inner hyphens.",
    )
    model: ModelSpec
    pooling: PoolingSpec = Field(default_factory=PoolingSpec)
    engine: EngineSpec = Field(default_factory=EngineSpec)
    resources: ResourceSpec = Field(default_factory=ResourceSpec)
    scaling: ScalingSpec = Field(default_factory=ScalingSpec)
    schedules: tuple[ScheduleSpec, ...] = Field(
        default=(), max_length=64, description="Windows in which replicas are kept ready."
    )
    queue: QueueSpec = Field(default_factory=QueueSpec)
    timeouts: TimeoutSpec = Field(default_factory=TimeoutSpec)
    webhooks: WebhookSpec = Field(default_factory=WebhookSpec)
    cost: CostSpec = Field(default_factory=CostSpec)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        contradictions = list(self._contradictions())
        if contradictions:
            message = "; ".join(f"{key} {problem}" for key, problem in contradictions)
            context: dict[str, Any] = {"message": message, "contradictions": contradictions}
            raise PydanticCustomError("contradiction", "{message}", context)
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        scaling, engine, gpus = self.scaling, self.engine, self.resources.gpus
        if self.model.task is Task.GENERATE and self.pooling != PoolingSpec():
            yield "pooling", "must be left out when model.task is generate"
        if scaling.min_replicas > scaling.max_replicas:
            yield (
                "scaling.min_replicas",
                f"must be at most scaling.max_replicas ({scaling.max_replicas})",
            )
        for index, window in enumerate(self.schedules):
            if window.min_replicas > scaling.max_replicas:
                yield (
                    f"schedules.{index}.min_replicas",
                    f"must be at most scaling.max_replicas ({scaling.max_replicas})",
                )
        if scaling.target_concurrency > scaling.max_concurrency:
            yield (
                "scaling.target_concurrency",
                f"must be at most scaling.max_concurrency ({scaling.max_concurrency})",
            )
        if engine.tensor_parallel_size != max(gpus, 1):
            yield (
                "engine.tensor_parallel_size",
                f"must be {max(gpus, 1)} when resources.gpus is {gpus}",
            )
        if engine.max_num_batched_tokens < engine.max_num_seqs:
            yield (
                "engine.max_num_batched_tokens",
                f"must be at least engine.max_num_seqs ({engine.max_num_seqs})",
            )

    @property
    def served_names(self) -> tuple[str, ...]:
        """Model ids that reach this function."""
        return self.model.served_names or (self.name,)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values, durations in seconds and sizes in bytes."""
        return self.model_dump(mode="json")


def revision(spec: FunctionSpec) -> str:
    """Return 12 hex digits that name the meaning of a spec: `5m` and `300` give the same."""
    meaning = spec.to_json()
    meaning["model"]["served_names"] = list(spec.served_names)
    canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _positive(duration: float) -> float:
    if duration <= 0:
        raise ValueError("must be over 0")
    return duration
