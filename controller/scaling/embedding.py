"""What the gateway asks of a function that embeds, and what it gets back. Token ids only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from controller.errors import InvalidSpec
from functions.spec import FunctionSpec, PoolingMode, Task

if TYPE_CHECKING:
    from controller.scaling.generation import GenerationRecord

POOLING_FILE = "pooling.json"
LIVE_RESULTS = 4  # of the widest, in fp32, at the same time
ENCODERS = frozenset({"bert"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a function embeds, everything resolved.

    Attributes:
        mode: How the vectors of tokens become a text's.
        normalize: Whether that is scaled to length 1.
        size: Numbers in a vector.
        shorter: Sizes a caller may cut it to; empty for none, None for any.
        max_tokens: Longest text its author means it for; None leaves that to the model.
        bytes_per_token: What a token takes while it is computed, at most.
    """

    mode: str
    normalize: bool
    size: int
    shorter: tuple[int, ...] | None
    max_tokens: int | None
    bytes_per_token: int = 0

    def allows(self, dimensions: int) -> bool:
        """Return whether a caller may have vectors of this size."""
        if dimensions == self.size:
            return True
        return 1 <= dimensions < self.size and (self.shorter is None or dimensions in self.shorter)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """The texts of one call.

    Attributes:
        request_id: Correlates logs, headers and the usage record.
        texts: At least one, none of them empty, all ids inside the vocabulary.
        dimensions: Numbers to keep of each vector; None keeps all.
        num_bytes: The request body's, counted against the queue's byte bound.
        key_id: The API key that pays, if keys are in use.
        received_at: Monotonic second the call arrived; None if nobody knows.
        may_wake: Whether a replica is brought up for it; else it is refused unless one has room.
    """

    request_id: str
    texts: Sequence[Sequence[int]]
    dimensions: int | None
    num_bytes: int
    key_id: str | None = None
    received_at: float | None = None
    may_wake: bool = True


class Embedding(Protocol):
    """One admitted call: enter to admit, run for the vectors, exit to release.

    Entering admits at once or raises QueueFull, ActivationFailed, ModelNotFound or ShuttingDown.
    Running waits for a replica and raises any of these, or ActivationTimeout, RuntimeDied or
    FirstTokenTimeout. Exiting gives the lease back and writes the usage record, also when the
    task is being cancelled, which ends the work on the replica.
    """

    record: "GenerationRecord"

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def run(self) -> Sequence[bytes]:
        """Return one vector per text, little-endian float32."""


def pooling_of(spec: FunctionSpec, snapshot: Path) -> Pooling | None:
    """Return how a function embeds; None for one that generates.

    Left to us, a function embeds if its model is an encoder, or if its author says how to pool.

    Raises:
        InvalidSpec: The spec asks for what the model cannot do, or the snapshot is not complete.
    """
    config = _read(snapshot / "config.json")
    path = snapshot / POOLING_FILE
    told = _read(path) if path.exists() else {}
    is_encoder = config.get("model_type") in ENCODERS
    if spec.model.task is Task.GENERATE and is_encoder:
        raise InvalidSpec(
            f"model.task is generate and a {config.get('model_type')} model only embeds; set it "
            "to embed, or leave it out",
            param="model.task",
        )
    if spec.model.task is Task.GENERATE or (
        spec.model.task is Task.AUTO and not is_encoder and not told
    ):
        return None
    wanted = spec.pooling
    mode = str(told.get("mode") or ("mean" if is_encoder else "last"))
    size = _size(config, snapshot)
    shorter = _shorter(config) if wanted.dimensions is None else wanted.dimensions
    if shorter and max(shorter) > size:
        raise InvalidSpec(
            f"pooling.dimensions has {max(shorter)} and the model's vectors have {size} numbers",
            param="pooling.dimensions",
        )
    return Pooling(
        mode=mode if wanted.mode is PoolingMode.AUTO else str(wanted.mode),
        normalize=bool(told.get("normalize", True))
        if wanted.normalize is None
        else wanted.normalize,
        size=size,
        shorter=shorter,
        max_tokens=told.get("max_tokens"),
        bytes_per_token=_bytes_per_token(config, size),
    )


def _bytes_per_token(config: Mapping[str, Any], size: int) -> int:
    widest = max(2 * int(config.get("intermediate_size") or 4 * size), 3 * size)
    return LIVE_RESULTS * widest * 4


def _size(config: Mapping[str, Any], snapshot: Path) -> int:
    size = config.get("hidden_size")
    if type(size) is not int:
        raise InvalidSpec(
            f"the config.json of snapshot {snapshot.name!r} has no usable hidden_size: {size!r}; "
            "build the snapshot again"
        )
    return size


def _shorter(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the sizes a model was trained to be cut to, under the names vLLM reads."""
    named = config.get("matryoshka_dimensions")
    if isinstance(named, list) and named:
        return tuple(sorted(int(size) for size in named))
    return None if config.get("is_matryoshka") is True else ()


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSpec(
            f"{path.name} of snapshot {path.parent.name!r} cannot be read: {error!r}; build the "
            "snapshot again"
        ) from error
    return content
